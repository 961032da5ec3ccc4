"""What a scaling study reads of a finished run: its evaluations, and what it had cost up to each of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from statistics import NormalDist

import numpy as np

from stare_megatron.compare import derived
from stare_megatron.compare.group import seed as seed_of
from stare_megatron.compare.load import Run, Setting, State, load_all
from stare_megatron.compare.stats import band
from stare_megatron.errors import UserError
from stare_megatron.metrics import eval_records, jsonl
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.weights import parameters as parameters_of

WHOLE = "eval/avg"  # over all benchmarks
_LAST = 10  # steps that end values are means of


class Axis(Enum):
    FLOPS = "flops"
    TOKENS = "tokens"
    STEPS = "steps"
    HOURS = "hours"


@dataclass(frozen=True)
class Trial:
    """One run. `parameters`: of its policy, None where not known; `model`: how it calls its model.

    `steps`: int64 [n], of its evaluations, rising, 0 for that before the first step; `accuracy`, `se`: float64 [n];
    `se` is 0 where not known; `cost`: float64 [n] on each axis that the record has, without what evaluations took.
    `entropy`: mean of the last ten steps, nats; `in_band`: share of the steps after the first one in the band that lie
    in it; NaN where not defined. `gpu`: whether its devices are GPUs, None where not recorded.
    """

    run: Run
    seed: int | None
    parameters: int | None
    model: str
    steps: np.ndarray
    accuracy: np.ndarray
    se: np.ndarray
    cost: Mapping[Axis, np.ndarray]
    entropy: float
    in_band: float
    gpu: bool | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.run.name


def read(paths: Sequence[Path], benchmark: str, now: float) -> list[Trial]:
    """Every run under the paths.

    Args:
        benchmark: which one's avg@k is the accuracy; "" for the mean over all.
        now: seconds since the epoch, see `compare.load.load_all`.

    Raises:
        UserError: no run, a damaged file, or a run without such an evaluation.
    """
    return [_trial(run, benchmark) for run in load_all(paths, now)]


def devices(settings: Mapping[str, Setting]) -> tuple[int, int, int]:
    """Ranks, engine workers, and devices of a run: colocated engines share those of the ranks."""

    def number(key: str) -> int:
        value = settings.get(key, 1)
        return value if isinstance(value, int) else 1

    ranks = number("trainer.world_size")
    workers = number("inference.engines") * number("inference.tensor_parallel")
    shared = settings.get("inference.placement", "colocated") == "colocated"
    return ranks, workers, max(ranks, workers) if shared else ranks + workers


def _trial(run: Run, benchmark: str) -> Trial:
    steps, accuracy, se = _evaluations(run, benchmark)
    start = [] if run.steps[0] == 1 else [f"its record begins at step {run.steps[0]}: costs before it are not known"]
    going = [f"{run.state.value} at step {run.steps[-1]}"] if run.state in (State.RUNNING, State.STOPPED) else []
    hardware = run.starts[-1].hardware if run.starts else ""
    target = derived.target(run, None)
    entropy = run.series.get("policy/entropy")
    in_band = math.nan
    if entropy is not None and target is not None:
        in_band = band(entropy.tolist(), target.tolist(), run.steps.tolist()).share_in_band
    return Trial(
        run=run,
        seed=seed_of(run),
        parameters=_parameters(run),
        model=_model(run),
        steps=steps,
        accuracy=accuracy,
        se=se,
        cost={} if start else _costs(run, steps),
        entropy=math.nan if entropy is None else float(np.nanmean(entropy[-_LAST:])),
        in_band=in_band,
        gpu=not hardware.endswith("no GPU") if hardware else None,
        notes=(*run.notes, *start, *going),
    )


def _evaluations(run: Run, benchmark: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, accuracies and standard errors. Of `eval.jsonl`, which also has the policy before the first step; else of
    the metrics."""
    table = run.folder / eval_records.TABLE
    if table.is_file():
        rows = jsonl.read(table)
    else:
        names = [name for name in run.series if name.startswith("eval/")]
        rows = [
            {"step": float(step)} | {name: float(run.series[name][i]) for name in names}
            for i, step in enumerate(run.steps)
        ]
    key = _key(run, rows, benchmark)
    last = int(run.steps[-1])
    kept = [row for row in rows if math.isfinite(row.get(key, math.nan)) and row["step"] <= last]
    if not kept:
        raise UserError(
            f"{run.folder}: no evaluation in its record; a scaling study needs eval.benchmarks and eval.every"
        )
    level = run.settings.get("eval.confidence", 0.95)
    z = NormalDist().inv_cdf(0.5 + (level if isinstance(level, float) else 0.95) / 2)
    return (
        np.array([row["step"] for row in kept]).astype(np.int64),
        np.array([row[key] for row in kept]),
        np.array([_error(row, key, z) for row in kept]),
    )


def _key(run: Run, rows: Sequence[jsonl.Row], benchmark: str) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    found = {m.group(1): name for name in names if (m := re.fullmatch(r"eval/([^/]+)/avg@\d+", name))}
    if benchmark:
        if benchmark not in found:
            have = ", ".join(sorted(found)) or "none"
            raise UserError(f"{run.folder}: --benchmark {benchmark}: not evaluated; its benchmarks: {have}")
        return found[benchmark]
    # One benchmark's own name comes with an interval; the mean over several has none.
    return next(iter(found.values())) if len(found) == 1 else WHOLE


def _error(row: jsonl.Row, key: str, z: float) -> float:
    """Standard error, from half the width of the interval; 0 without one."""
    low, high = row.get(f"{key}/ci_low", math.nan), row.get(f"{key}/ci_high", math.nan)
    return (high - low) / (2 * z) if math.isfinite(high - low) else 0.0


def _parameters(run: Run) -> int | None:
    """As run.json says; of older records, as the model's config.json does where it is still there."""
    record = run.folder / "run.json"
    if record.is_file():
        newest = json.loads(record.read_text())["starts"][-1]
        if "parameters" in newest:
            return int(newest["parameters"])
    path = run.settings.get("model.path")
    if isinstance(path, str) and (Path(path) / "config.json").is_file():
        return parameters_of(read_hf_config(Path(path)))
    return None


def _model(run: Run) -> str:
    """The last two parts of the model's path, without the run's seed: each seed may have a model of its own."""
    path = run.settings.get("model.path")
    if not path:
        return "model not recorded"
    short = "/".join(str(path).rstrip("/").split("/")[-2:])
    number = seed_of(run)
    return short if number is None else re.sub(rf"[-_.]?(seed|s)?[-_.]?0*{number}(?!\d)", "", short).strip("/")


def _costs(run: Run, steps: np.ndarray) -> dict[Axis, np.ndarray]:
    """What the run had cost when it was evaluated, float64 [evaluations] on each axis that it logged."""
    series = run.series
    each: dict[Axis, np.ndarray] = {Axis.STEPS: np.ones(len(run.steps))}
    ranks, workers, count = devices(run.settings)
    if "time/step" in series:
        each[Axis.HOURS] = series["time/step"] * count / 3600
    if "throughput/trained_tokens" in series:
        each[Axis.TOKENS] = series["throughput/trained_tokens"]
    sampling = series.get("engine/sampling_seconds", series.get("time/rollout"))
    phases = (("rollout", sampling, workers), ("score", series.get("time/score"), ranks))
    phases = (*phases, ("update", series.get("time/update"), ranks))
    if all(seconds is not None and f"rates/{phase}_tflops" in series for phase, seconds, _ in phases):
        each[Axis.FLOPS] = np.sum(
            [
                1e12 * n * np.where(seconds > 0, series[f"rates/{phase}_tflops"] * seconds, 0.0)
                for phase, seconds, n in phases
                if seconds is not None
            ],
            axis=0,
        )
    found = {}
    for axis, values in each.items():
        total = np.concatenate([[0.0], np.cumsum(values)])
        if np.all(np.isfinite(total)):
            found[axis] = total[np.searchsorted(run.steps, steps, side="right")]
    return found
