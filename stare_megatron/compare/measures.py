"""The table: one number per run and measure, then mean and spread over the runs of a group."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from stare_megatron.compare import derived
from stare_megatron.compare.group import Group
from stare_megatron.compare.load import Run
from stare_megatron.compare.stats import Spread, band, spread

Value = Callable[[Run], float | None]


@dataclass(frozen=True)
class Measure:
    """`key`: as in the JSON file; `meaning`: how the number comes from the run's metrics."""

    key: str
    section: str
    label: str
    unit: str
    meaning: str
    value: Value


@dataclass(frozen=True)
class Row:
    """A measure in every group, in the groups' order."""

    measure: Measure
    cells: tuple[Spread, ...]


def table(groups: Sequence[Group], last: int, reference: float | None) -> tuple[list[Row], list[str]]:
    """The rows some run has a value for, and the labels of the measures no run has.

    Args:
        last: steps over which end values are averaged.
        reference: see `derived.target`.
    """
    runs = [run for g in groups for run in g.runs]
    rows, absent = [], []
    for measure in measures(runs, last, reference):
        cells = tuple(spread({run.name: measure.value(run) for run in g.runs}) for g in groups)
        if any(cell.n for cell in cells):
            rows.append(Row(measure, cells))
        else:
            absent.append(measure.label)
    return rows, absent


def measures(runs: Sequence[Run], last: int, reference: float | None) -> list[Measure]:
    """All measures, those of every `eval/` metric and `time/` phase of the runs among them."""
    end = f"Mean of {{}} over the last {last} steps (all, if fewer)."
    names = list(dict.fromkeys(name for run in runs for name in run.series))

    def at_end(key: str, section: str, label: str, name: str) -> Measure:
        value = partial(_mean, name=name, last=last)
        return Measure(key, section, label, derived.info(name).unit, end.format(name), value)

    def over_all(key: str, section: str, label: str, name: str) -> Measure:
        meaning = f"Mean of {name} over all steps."
        return Measure(key, section, label, derived.info(name).unit, meaning, partial(_mean, name=name, last=None))

    def largest(key: str, section: str, label: str, name: str) -> Measure:
        meaning = f"Largest {name} of all steps."
        return Measure(key, section, label, derived.info(name).unit, meaning, partial(_max, name=name))

    phases = [n for n in names if n.startswith("time/") and n not in ("time/step", "time/elapsed")]
    return [
        *_entropy(end, last, reference),
        Measure(
            "reward_first",
            "Learning",
            f"reward, first {last} steps",
            "reward",
            f"Mean of reward/mean over the first {last} steps (all, if fewer).",
            lambda run: _mean(run, "reward/mean", last, first=True),
        ),
        at_end("reward_last", "Learning", f"reward, last {last} steps", "reward/mean"),
        at_end("correct_last", "Learning", f"accuracy, last {last} steps", "reward/correct"),
        *(_evaluation(name) for name in derived.evaluations(names)),
        at_end("length_last", "Responses", "response length", "response/length_mean"),
        at_end("truncated_last", "Responses", "truncated responses", "response/truncated"),
        at_end("reflection_last", "Responses", "reflection words", "response/reflections"),
        at_end("all_correct_last", "Groups", "fully solved groups", "all_correct_fraction"),
        at_end("none_correct_last", "Groups", "unsolved groups", "none_correct_fraction"),
        at_end("dropped_last", "Groups", "dropped groups", "dropped_fraction"),
        Measure(
            "gate_duty",
            "Control",
            "gate duty",
            "fraction",
            "Share of all steps at which the gate was open; only methods with a target.",
            lambda run: _mean(run, "stare/gate", None) if derived.steered(run) else None,
        ),
        *_dynamics(),
        at_end("grad_norm_last", "Optimisation", "gradient norm", "update/grad_norm"),
        over_all("clip_fraction", "Optimisation", "clipped tokens", "update/clip_fraction"),
        largest("mismatch_mean", "Engine against trainer", "mismatch, worst step mean", "mismatch/mean"),
        largest("mismatch_max", "Engine against trainer", "mismatch, worst token", "mismatch/max"),
        *_cost(),
        *(over_all(f"seconds_{n[5:]}", "Cost", f"{n[5:]}, a step", n) for n in phases),
        largest("trainer_peak", "Cost", "memory, trainer rank", "memory/trainer_peak"),
        largest("engine_peak", "Cost", "memory, engine", "memory/engine_peak"),
        largest("driver_peak", "Cost", "memory, driver", "memory/driver_peak"),
    ]


def _entropy(end: str, last: int, reference: float | None) -> list[Measure]:
    def of_band(field: str) -> Value:
        def value(run: Run) -> float | None:
            goals, entropies = derived.target(run, reference), run.series.get("policy/entropy")
            if goals is None or entropies is None or not np.isfinite(goals).any():
                return None
            found = vars(band(entropies.tolist(), goals.tolist(), run.steps.tolist()))[field]
            return None if found is None or math.isnan(found) else float(found)

        return value

    def goal(run: Run) -> float | None:
        goals = derived.target(run, reference)
        return None if goals is None or not np.isfinite(goals[-1]) else float(goals[-1])

    def ratio(run: Run) -> float | None:
        start, stop = _mean(run, "policy/entropy", 1, first=True), _mean(run, "policy/entropy", last)
        return None if start is None or stop is None or start == 0 else stop / start

    after = "the steps after the first one inside |H - H_tgt| <= 0.3 H_tgt"
    unit, section = "nats/token", "Entropy"
    return [
        Measure(
            "entropy_first",
            section,
            "entropy, first step",
            unit,
            "policy/entropy of the first step.",
            lambda run: _mean(run, "policy/entropy", 1, first=True),
        ),
        Measure(
            "entropy_last",
            section,
            f"entropy, last {last} steps",
            unit,
            end.format("policy/entropy"),
            lambda run: _mean(run, "policy/entropy", last),
        ),
        Measure(
            "entropy_ratio", section, "last / first", "ratio", "Entropy of the last steps by that of the first.", ratio
        ),
        Measure("target", section, "target H_tgt", unit, "Target of the last step.", goal),
        Measure("first_in_band", section, "first step in band", "step", "First step inside.", of_band("first_step")),
        Measure("share_in_band", section, "time in band", "fraction", f"Share of {after}.", of_band("share_in_band")),
        Measure(
            "overshoot",
            section,
            "overshoot",
            unit,
            f"Largest distance from the band's nearer edge in {after}.",
            of_band("overshoot"),
        ),
        Measure(
            "rms_error",
            section,
            "RMS error",
            unit,
            f"Root mean square of H - H_tgt over {after}.",
            of_band("rms_error"),
        ),
        Measure(
            "longest_outside",
            section,
            "longest time outside",
            "steps",
            f"Longest unbroken row outside the band in {after}.",
            lambda run: of_band("longest_outside")(run) if of_band("share_in_band")(run) is not None else None,
        ),
    ]


def _evaluation(name: str) -> Measure:
    meaning = f"Newest value of {name}."
    return Measure(
        name, "Evaluation", name.removeprefix("eval/"), derived.info(name).unit, meaning, partial(_newest, name=name)
    )


def _dynamics() -> list[Measure]:
    def pairs(run: Run) -> tuple[np.ndarray, np.ndarray]:
        said, seen = run.series.get("dynamics/predicted_change_before"), run.series.get("dynamics/measured_change")
        if said is None or seen is None:
            return np.array([]), np.array([])
        both = np.isfinite(said) & np.isfinite(seen)
        return said[both], seen[both]

    def correlation(run: Run) -> float | None:
        said, seen = pairs(run)
        if len(said) < 3 or np.ptp(said) == 0 or np.ptp(seen) == 0:
            return None
        return float(np.corrcoef(said, seen)[0, 1])

    def agreement(run: Run) -> float | None:
        said, seen = pairs(run)
        return float(np.mean(np.sign(said) == np.sign(seen))) if len(said) else None

    where = "dynamics/predicted_change_before and dynamics/measured_change over all steps"
    return [
        Measure(
            "prediction_correlation",
            "Entropy dynamics",
            "predicted against measured change",
            "correlation",
            f"Pearson correlation of {where}.",
            correlation,
        ),
        Measure(
            "prediction_sign",
            "Entropy dynamics",
            "sign predicted right",
            "fraction",
            f"Equal signs of {where}.",
            agreement,
        ),
        Measure(
            "overlap",
            "Entropy dynamics",
            "overlap with the exact set",
            "fraction",
            "Mean of dynamics/overlap over all steps.",
            lambda run: _mean(run, "dynamics/overlap", None),
        ),
    ]


def _cost() -> list[Measure]:
    def speed(run: Run) -> float | None:
        rate, seconds = run.series.get("throughput/tokens_per_second"), run.series.get("time/step")
        if rate is None or seconds is None:
            return None
        have = np.isfinite(rate) & np.isfinite(seconds)
        whole = float(seconds[have].sum())
        return float((rate[have] * seconds[have]).sum()) / whole if whole else None

    def minutes(run: Run) -> float | None:
        seconds = run.series.get("time/step")
        return None if seconds is None else float(np.nansum(seconds)) / 60

    return [
        Measure("steps", "Cost", "steps done", "steps", "Number of the last step.", lambda run: float(run.steps[-1])),
        Measure(
            "trained_tokens",
            "Cost",
            "tokens trained on",
            "tokens",
            "Newest throughput/trained_tokens_total.",
            partial(_newest, name="throughput/trained_tokens_total"),
        ),
        Measure("minutes", "Cost", "wall-clock", "min", "Sum of time/step over all starts.", minutes),
        Measure(
            "tokens_per_second",
            "Cost",
            "tokens/s",
            "tokens/s",
            "throughput/tokens_per_second, weighted by time/step: all tokens sampled by all time.",
            speed,
        ),
    ]


def _finite(run: Run, name: str) -> np.ndarray:
    values = derived.series(run, name)
    return np.array([]) if values is None else values[np.isfinite(values)]


def _mean(run: Run, name: str, last: int | None, first: bool = False) -> float | None:
    """Over the last or first steps of the run, or all; values that are not finite are left out."""
    values = derived.series(run, name)
    if values is None:
        return None
    part = values if last is None else (values[:last] if first else values[-last:])
    part = part[np.isfinite(part)]
    return statistics.fmean(part.tolist()) if len(part) else None


def _newest(run: Run, name: str) -> float | None:
    values = _finite(run, name)
    return float(values[-1]) if len(values) else None


def _max(run: Run, name: str) -> float | None:
    values = _finite(run, name)
    return float(values.max()) if len(values) else None
