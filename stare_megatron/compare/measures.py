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
from stare_megatron.compare.panels import MEASURED, PREDICTED, phases
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
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    end = f"Mean of {{}} over the last {last} steps (all, if fewer)."

    def of(key: str, section: str, label: str, name: str, meaning: str, value: Callable[..., float | None]) -> Measure:
        """A value of one series, in that series' unit."""
        return Measure(key, section, label, derived.info(name).unit, meaning.format(name), partial(value, name=name))

    def at_end(key: str, section: str, label: str, name: str) -> Measure:
        return of(key, section, label, name, end, partial(_mean, last=last))

    def over_all(key: str, section: str, label: str, name: str) -> Measure:
        return of(key, section, label, name, "Mean of {} over all steps.", _mean)

    def largest(key: str, section: str, label: str, name: str) -> Measure:
        return of(key, section, label, name, "Largest {} of all steps.", _max)

    def newest(key: str, section: str, label: str, name: str) -> Measure:
        return of(key, section, label, name, "Newest value of {}.", _newest)

    def gate_duty(run: Run) -> float | None:
        return _mean(run, "stare/gate") if derived.steered(run) else None

    reward, learning, against = "reward/mean", "Learning", "Engine against trainer"
    start = f"Mean of {{}} over the first {last} steps (all, if fewer)."
    duty = "Share of all steps at which the gate was open; only methods with a target."
    return [
        *_entropy(last, reference),
        of("reward_first", learning, f"reward, first {last} steps", reward, start, partial(_mean, first=last)),
        at_end("reward_last", learning, f"reward, last {last} steps", reward),
        at_end("correct_last", learning, f"accuracy, last {last} steps", "reward/correct"),
        *(newest(name, "Evaluation", name.removeprefix("eval/"), name) for name in derived.evaluations(names)),
        at_end("length_last", "Responses", "response length", "response/length_mean"),
        at_end("truncated_last", "Responses", "truncated responses", "response/truncated"),
        at_end("reflection_last", "Responses", "reflection words", "response/reflections"),
        at_end("all_correct_last", "Groups", "fully solved groups", "all_correct_fraction"),
        at_end("none_correct_last", "Groups", "unsolved groups", "none_correct_fraction"),
        at_end("dropped_last", "Groups", "dropped groups", "dropped_fraction"),
        Measure("gate_duty", "Control", "gate duty", "fraction", duty, gate_duty),
        *_dynamics(),
        over_all("overlap", "Entropy dynamics", "overlap with the exact set", "dynamics/overlap"),
        at_end("grad_norm_last", "Optimisation", "gradient norm", "update/grad_norm"),
        over_all("clip_fraction", "Optimisation", "clipped tokens", "update/clip_fraction"),
        largest("mismatch_mean", against, "mismatch, worst step mean", "mismatch/mean"),
        largest("mismatch_max", against, "mismatch, worst token", "mismatch/max"),
        Measure("steps", "Cost", "steps done", "steps", "Number of the last step.", lambda run: float(run.steps[-1])),
        newest("trained_tokens", "Cost", "tokens trained on", "throughput/trained_tokens_total"),
        *_speed(),
        *(over_all(f"seconds_{n[5:]}", "Cost", f"{n[5:]}, a step", n) for n in phases(runs)),
        largest("trainer_peak", "Cost", "memory, trainer rank", "memory/trainer_peak"),
        largest("engine_peak", "Cost", "memory, engine", "memory/engine_peak"),
        largest("driver_peak", "Cost", "memory, driver", "memory/driver_peak"),
    ]


def _entropy(last: int, reference: float | None) -> list[Measure]:
    def of_band(field: str) -> Value:
        def value(run: Run) -> float | None:
            goals, entropies = derived.target(run, reference), run.series.get("policy/entropy")
            if goals is None or entropies is None or not np.isfinite(goals).any():
                return None
            found = band(entropies.tolist(), goals.tolist(), run.steps.tolist())
            number = vars(found)[field]
            # Without a step after the first one inside, nothing was outside for long either.
            return (
                None
                if number is None or math.isnan(number) or (field != "first_step" and not found.steps_after)
                else float(number)
            )

        return value

    def goal(run: Run) -> float | None:
        goals = derived.target(run, reference)
        return None if goals is None or not np.isfinite(goals[-1]) else float(goals[-1])

    def first(run: Run) -> float | None:
        return _mean(run, "policy/entropy", first=1)

    def end(run: Run) -> float | None:
        return _mean(run, "policy/entropy", last=last)

    def ratio(run: Run) -> float | None:
        start, stop = first(run), end(run)
        return None if start is None or stop is None or start == 0 else stop / start

    def row(key: str, label: str, unit: str, meaning: str, value: Value) -> Measure:
        return Measure(key, "Entropy", label, unit, meaning, value)

    nats, mean = "nats/token", f"Mean of policy/entropy over the last {last} steps (all, if fewer)."
    after = "the steps after the first one inside |H - H_tgt| <= 0.3 H_tgt"
    furthest = f"Largest distance from the band's nearer edge in {after}."
    longest = f"Longest unbroken row outside the band in {after}."
    return [
        row("entropy_first", "entropy, first step", nats, "policy/entropy of the first step.", first),
        row("entropy_last", f"entropy, last {last} steps", nats, mean, end),
        row("entropy_ratio", "last / first", "ratio", "Entropy of the last steps by that of the first.", ratio),
        row("target", "target H_tgt", nats, "Target of the last step.", goal),
        row("first_in_band", "first step in band", "step", "First step inside.", of_band("first_step")),
        row("share_in_band", "time in band", "fraction", f"Share of {after}.", of_band("share_in_band")),
        row("overshoot", "overshoot", nats, furthest, of_band("overshoot")),
        row("rms_error", "RMS error", nats, f"Root mean square of H - H_tgt over {after}.", of_band("rms_error")),
        row("longest_outside", "longest time outside", "steps", longest, of_band("longest_outside")),
    ]


def _dynamics() -> list[Measure]:
    def pairs(run: Run) -> tuple[np.ndarray, np.ndarray]:
        said, seen = run.series.get(PREDICTED), run.series.get(MEASURED)
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

    section, where = "Entropy dynamics", f"{PREDICTED} and {MEASURED} over all steps"
    pearson, label = f"Pearson correlation of {where}.", "predicted against measured change"
    return [
        Measure("prediction_correlation", section, label, "correlation", pearson, correlation),
        Measure("prediction_sign", section, "sign predicted right", "fraction", f"Equal signs of {where}.", agreement),
    ]


def _speed() -> list[Measure]:
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

    weighted = "throughput/tokens_per_second, weighted by time/step: all tokens sampled by all time."
    return [
        Measure("minutes", "Cost", "wall-clock", "min", "Sum of time/step over all starts.", minutes),
        Measure("tokens_per_second", "Cost", "tokens/s", "tokens/s", weighted, speed),
    ]


def _finite(run: Run, name: str, part: slice = slice(None)) -> np.ndarray:
    values = derived.series(run, name)
    return np.array([]) if values is None else values[part][np.isfinite(values[part])]


def _mean(run: Run, name: str, *, first: int | None = None, last: int = 0) -> float | None:
    """Over the first or the last steps of the run, or all; values that are not finite are left out."""
    values = _finite(run, name, slice(-last if last else None, first))
    return statistics.fmean(values.tolist()) if len(values) else None


def _newest(run: Run, name: str) -> float | None:
    values = _finite(run, name)
    return float(values[-1]) if len(values) else None


def _max(run: Run, name: str) -> float | None:
    values = _finite(run, name)
    return float(values.max()) if len(values) else None
