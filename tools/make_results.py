"""Write the tables of docs/results.md from the records of the runs: `python tools/make_results.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is in between is made here, from metrics and
evaluations under `examples/*/results*`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stare_megatron.compare.load import Run
from stare_megatron.metrics import eval_records, jsonl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.result_cells import (  # noqa: E402
    LAST,
    Cell,
    Column,
    Seeds,
    at,
    by_variant,
    centre,
    each,
    ends_at,
    entropy,
    evaluated,
    gate,
    held,
    kept,
    last,
    markdown,
    means,
    newest,
    runs,
    signed,
    spread,
    under_the_band,
)

PAGE = ROOT / "docs" / "results.md"
_BLOCK = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)

BAND = "entropy_band/results"
ENDS = ("", "/ci_low", "/ci_high")  # of the names of a value and its interval
STARE = {
    "stare_o1": "STARE-O1",
    "stare_c2": "STARE-C2",
    "stare_sens": "STARE-O1 by sensitivity",
    "stare_p": "the same, proportional",
    "stare_pi": "the same, proportional-integral",
}
ADAPTIVE = {"adaptive_entropy": "adaptive entropy bonus"}
THOUSANDS = {
    "grpo_ds-seed1": "GRPO-ds",
    "stare_auto-seed1": "STARE-O1, auto",
    "stare_auto_annealed-seed1": "the same, H_tgt falls from 0.12 to 0.03",
    "stare_auto_annealed-seed2": "the same, seed 2",
    "grpo_ds-seed2": "GRPO-ds, seed 2",
}
RIVALS = ADAPTIVE | {"entropy_bonus": "fixed entropy bonus", "clip_cov": "Clip-Cov"}
SETTINGS = {
    "grpo_ds": "GRPO-ds",
    "stare_o1": "STARE-O1 (paper's rule), P 3 %, W 8",
    "stare_c2": "STARE-C2 (paper's rule), P 3 %, W 8, M 0.5",
    "stare_sens": "STARE-O1 by exact sensitivity, P 10 %, W 8",
    "stare_p": "the same, proportional controller, W at most 16",
    "stare_pi": "the same, proportional-integral (kp 15, ki 0.5, W at most 9)",
    "adaptive_entropy": "adaptive entropy bonus, step 0.01, at most 0.3",
    "entropy_bonus": "fixed entropy bonus 0.03",
    "clip_cov": "Clip-Cov, 3 %",
}

UNDER_DELAY = (("auto", "STARE-O1, weight auto", (0, 1, 2, 4)), ("o1", "STARE-O1, the paper's rule", (0, 4)))


def _rms(off: np.ndarray) -> float:
    return float(np.sqrt((off**2).mean()))


def entropy_band() -> str:
    return by_variant(
        BAND,
        SETTINGS,
        [
            Column("entropy, first step", centre(3, lambda run: float(entropy(run)[0]))),
            Column(f"last {LAST} steps", spread(3, ends_at)),
            Column("in band", spread(2, kept(0.2, "share_in_band"))),
            Column("below, nats", centre(3, under_the_band(0.2))),
            Column("rms error, nats", centre(3, kept(0.2, "rms_error"))),
            Column("gate open", centre(2, gate)),
        ],
    )


def entropy_band_held() -> str:
    return by_variant(
        BAND,
        STARE | ADAPTIVE,
        [
            Column("rms error, nats", centre(4, held(0.2, _rms))),
            Column("mean error", signed(4, held(0.2, lambda off: float(off.mean())))),
            Column("within ±15 %", centre(2, held(0.2, lambda off: float((abs(off) <= 0.03).mean())))),
            Column("farthest below", centre(3, held(0.2, lambda off: max(0.0, float(-off.min()))))),
            Column("farthest above", centre(3, held(0.2, lambda off: max(0.0, float(off.max()))))),
        ],
    )


def entropy_band_accuracy() -> str:
    return by_variant(
        BAND,
        {"grpo_ds": "GRPO-ds"} | STARE | RIVALS,
        [
            Column("avg@32", spread(2, evaluated("avg@32"))),
            Column("greedy", centre(2, evaluated("greedy"))),
            Column("pass@4", centre(2, evaluated("pass@4"))),
            Column("pass@32", centre(2, evaluated("pass@32"))),
            Column("distinct right answers of 32", centre(1, evaluated("distinct_correct"))),
        ],
    )


def entropy_band_auto() -> str:
    return by_variant(
        "entropy_band/results_auto",
        {"stare_o1": "STARE-O1 (paper's rule), P 3 %, W 8", "auto": "STARE-O1, weight auto"},
        [
            Column("in band", each(2, kept(0.2, "share_in_band"))),
            Column("rms error, nats", centre(4, kept(0.2, "rms_error"))),
            Column("once held: rms error", centre(4, held(0.2, _rms))),
            Column("each seed", each(4, held(0.2, _rms))),
            Column("of means of five steps", centre(4, held(0.2, lambda off: _rms(means(off, 5))))),
            Column("mean error", signed(4, held(0.2, lambda off: float(off.mean())))),
            Column("within ±15 %", centre(2, held(0.2, lambda off: float((abs(off) <= 0.03).mean())))),
            Column("avg@32", spread(2, evaluated("avg@32"))),
            Column("pass@32", centre(2, evaluated("pass@32"))),
            Column("distinct right answers of 32", centre(1, evaluated("distinct_correct"))),
        ],
    )


def staleness() -> str:
    titles = {f"{name}_s{s}": f"{title}, S = {s}" for name, title, ages in UNDER_DELAY for s in ages}
    return by_variant(
        "entropy_band/results_staleness",
        titles,
        [
            Column("updates behind, mean", centre(1, last("sync/staleness_mean"))),
            Column(f"entropy, last {LAST} steps", spread(3, ends_at)),
            Column("in band", spread(2, kept(0.2, "share_in_band"))),
            Column("each seed", each(2, kept(0.2, "share_in_band"))),
            Column("rms error, nats", spread(3, kept(0.2, "rms_error"))),
            Column("farthest below, nats", centre(3, under_the_band(0.2))),
            Column("avg@32", spread(2, evaluated("avg@32"))),
        ],
    )


def longer() -> str:
    def accuracy(seeds: Seeds) -> str:
        (run,) = seeds
        step, value = newest(run, "eval/test/avg@32")
        return f"{value:.3f}" if step == run.steps[-1] else f"{value:.3f} (step {step})"

    own = spread(2, kept(0.2, "share_in_band"))
    titles = {f"grpo_ds-seed{s}": f"GRPO-ds, {s}" for s in (1, 2, 3)}
    titles |= {f"stare_o1_annealed-seed{s}": f"STARE-O1, H_tgt from 0.2 to 0.05, {s}" for s in (1, 2, 3)}
    titles |= {"stare_o1-seed1": "STARE-O1, H_tgt 0.2, 1", "stare_o1_low-seed1": "STARE-O1, H_tgt 0.1, 1"}
    titles |= {"adaptive_entropy-seed1": "adaptive entropy bonus, H_tgt 0.2, 1"}
    columns = [
        Column("steps", lambda seeds: f"{seeds[0].steps[-1]}"),
        Column(f"entropy, last {LAST} steps", spread(3, ends_at)),
        Column("in its band", lambda seeds: "-" if "grpo" in seeds[0].name else own(seeds)),
        Column("avg@32", accuracy),
        Column("greedy", spread(2, evaluated("greedy"))),
        Column("distinct right answers of 32", spread(1, evaluated("distinct_correct"))),
    ]
    return by_variant("entropy_band/results_long", titles, columns).replace("| variant |", "| variant, seed |", 1)


def disturbance() -> str:
    titles = {
        "grpo_ds": "GRPO-ds",
        "stare_o1": "STARE-O1",
        "stare_p": "STARE-O1 by sensitivity, proportional",
        "stare_auto": "STARE-O1, weight auto",
    } | ADAPTIVE
    return by_variant(
        "entropy_band/results_disturbance",
        titles,
        [
            Column("in band, all steps after the first in it", spread(2, kept(0.2, "share_in_band"))),
            Column(f"entropy, last {LAST} steps", spread(3, ends_at)),
            Column("avg@32", spread(2, evaluated("avg@32"))),
        ],
    )


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.2f} to {high:.2f})"


def with_interval(run: Run, metric: str, step: int) -> str:
    return interval(*(at(run, f"eval/test/{metric}{end}", step) for end in ENDS))


def number_walk() -> str:
    rows, titles = [], {"grpo_ds": "GRPO-ds", "stare_o1": "STARE-O1"}
    for seed in (1, 2):
        for step in (160, 240):
            for name, title in (titles | ({"stare_auto": "STARE-O1, auto"} if seed == 2 else {})).items():
                (run,) = runs("entropy_band/results_walk", f"{name}-seed{seed}")
                open_ = int((run.series["stare/gate"][run.steps <= step] > 0).sum())
                end = step == run.steps[-1]
                rows.append(
                    [
                        f"{title}, {seed}",
                        f"{step}",
                        f"{ends_at(run):.3f}" if end else "",
                        "-" if name == "grpo_ds" else f"{open_}",
                        with_interval(run, "avg@32", step),
                        f"{at(run, 'eval/test/pass@8', step):.3f}",
                        with_interval(run, "pass@32", step),
                        f"{at(run, 'eval/test/distinct_correct', step):.2f}",
                    ]
                )
    head = ["variant, seed", "step", f"entropy, last {LAST} steps", "steps with the gate open", "avg@32", "pass@8"]
    return markdown([*head, "pass@32", "distinct right answers of 32"], rows)


def thousands() -> str:
    """The last evaluation, and every second one before."""
    rows = []
    for name, title in THOUSANDS.items():
        (run,) = runs("entropy_band/results_thousands", name)
        for step in (400, 800, 1200, 1600, 2000):
            until = run.steps <= step
            rows.append(
                [
                    title if step == 400 else "",
                    f"{step:,}",
                    f"{run.series['groups/sampled'][until].sum():,.0f}",
                    f"{entropy(run)[until][-LAST:].mean():.3f}",
                    with_interval(run, "avg@64", step),
                    f"{at(run, 'eval/test/greedy', step):.3f}",
                    *(f"{at(run, f'eval/test/pass@{k}', step):.3f}" for k in (2, 8)),
                    with_interval(run, "pass@64", step),
                    f"{at(run, 'eval/test/distinct_correct', step):.2f}",
                ]
            )
    head = ["variant", "step", "groups sampled", f"entropy, last {LAST} steps", "avg@64", "greedy"]
    return markdown([*head, "pass@2", "pass@8", "pass@64", "distinct right answers of 64"], rows)


def thousands_top_p() -> str:
    """The last policies, sampled as one would use them."""
    rows, metrics = [], ("avg@64", "pass@2", "pass@8", "pass@64")
    for name, title in THOUSANDS.items():
        file = ROOT / "examples/entropy_band/results_thousands/top_p_0.7" / f"{name}.jsonl"
        found = json.loads(file.read_text())
        distinct = f"{found['eval/test/distinct_correct']:.2f}"
        values = [interval(*(found[f"eval/test/{metric}{end}"] for end in ENDS)) for metric in metrics]
        rows.append([title, *values, distinct])
    return markdown(["variant", *metrics, "distinct right answers of 64"], rows)


def thousands_held() -> str:
    return by_variant(
        "entropy_band/results_thousands",
        THOUSANDS,
        [
            Column("steps", lambda seeds: f"{seeds[0].steps[-1]:,}"),
            Column("in band", spread(3, kept(0.12, "share_in_band"))),
            Column("mean error once held, nats", signed(4, held(0.12, lambda off: float(off.mean())))),
            Column("rms error once held, nats", spread(4, held(0.12, lambda off: float(np.sqrt((off**2).mean()))))),
            Column(f"reward, last {LAST} steps", spread(3, last("reward/mean"))),
        ],
    )


def by_size() -> str:
    def cell(value: Callable[[Run], float], digits: int = 3) -> Cell:
        return each(digits, value)

    rows, measured = (
        [],
        [
            cell(lambda run: before(run)["eval/test/avg@8"]),
            cell(evaluated("avg@8")),
            cell(evaluated("pass@8")),
            cell(ends_at),
            cell(kept(0.2, "share_in_band"), 2),
        ],
    )
    for size in ("30k", "114k", "490k", "1.9M"):
        for name, title in (("grpo_ds", "GRPO-ds"), ("stare", "STARE-O1, auto")):
            seeds = runs("scaling_cpu/results", f"{name}_{size}")
            rows.append([f"{size}, {title}", *(column(seeds) for column in measured)])
    head = ["size, method", "avg@8, before", "avg@8", "pass@8", f"entropy, last {LAST} steps", "in band"]
    return markdown(head, rows)


def before(run: Run) -> dict[str, float]:
    """The evaluation of the policy before the first step."""
    return jsonl.read(run.folder / eval_records.TABLE)[0]


def worst_mismatch(run: Run) -> float:
    return float(np.nanmax(run.series["mismatch/max"]))


def tool_use() -> str:
    accuracy = [("avg@8", 2), ("greedy", 2), ("distinct_correct", 1)]
    warm = runs("tool_use_cpu/results", "grpo_ds")
    first = [spread(digits, lambda run, m=metric: before(run)[f"eval/test/{m}"])(warm) for metric, digits in accuracy]
    rows = [["warm start", first[0], "", *first[1:], spread(3, lambda run: float(entropy(run)[0]))(warm), "", ""]]
    for name, title in (("grpo_ds", "GRPO-ds"), ("stare_o1", "STARE-O1, P 5 %, W 8, H_tgt 0.2")):
        seeds = runs("tool_use_cpu/results", name)
        avg, *others = [spread(digits, evaluated(metric))(seeds) for metric, digits in accuracy]
        rows.append(
            [
                title,
                avg,
                each(2, evaluated("avg@8"))(seeds),
                *others,
                spread(3, ends_at)(seeds),
                each(2, kept(0.2, "share_in_band"))(seeds),
                f"{max(map(worst_mismatch, seeds)):.1e}",
            ]
        )
    head = ["", "avg@8, held out", "each seed", "greedy", "distinct right answers of 8"]
    return markdown([*head, f"entropy, last {LAST} steps", "in band, each seed", "largest mismatch, nats"], rows)


def pretrained() -> str:
    rows = []
    for task, source, title in (("digits", "eval", "one digit"), ("chain_sum", "chain_sum-test", "chain_sum")):
        for name, method in (("grpo_ds", "GRPO-ds"), ("stare_o1", "STARE-O1")):
            (run,) = runs("smollm2_arithmetic/results", f"{task}_{name}-seed1")
            was, known = before(run), f"eval/{source}/"
            step, avg = newest(run, f"{known}avg@4")
            low, high = (at(run, f"{known}avg@4/ci_{end}", step) for end in ("low", "high"))
            pairs = (
                f"{was[known + metric]:.{digits}f}, {at(run, known + metric, step):.{digits}f}"
                for metric, digits in (("pass@4", 3), ("greedy", 3), ("distinct_correct", 2))
            )
            rows.append(
                [
                    f"{title}, {method}",
                    f"{step}",
                    f"{was[known + 'avg@4']:.3f}, {avg:.3f} ({low:.2f} to {high:.2f})",
                    *pairs,
                    f"{entropy(run)[0]:.3f}, {entropy(run)[-3:].mean():.3f}",
                    "-" if name == "grpo_ds" else f"{int((run.series['stare/gate'] > 0).sum())}",
                    f"{worst_mismatch(run):.1e}",
                    f"{statistics.median(run.series['time/step'].tolist()):.0f}",
                ]
            )
    head = ["task, method", "steps", "avg@4, before and after", "pass@4", "greedy", "distinct right answers of 4"]
    more = ["entropy, first and last three steps", "steps with the gate open", "largest mismatch, nats", "s per step"]
    return markdown([*head, *more], rows)


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        entropy_band,
        entropy_band_held,
        entropy_band_accuracy,
        entropy_band_auto,
        staleness,
        longer,
        disturbance,
        number_walk,
        thousands,
        thousands_top_p,
        thousands_held,
        by_size,
        tool_use,
        pretrained,
    )
}


def page(text: str) -> str:
    """`text` with every table made again."""
    return _BLOCK.sub(lambda m: f"<!-- table: {m[1]} -->\n{TABLES[m[1]]()}<!-- end -->\n", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
