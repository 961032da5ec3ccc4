"""What a metric is called and measured in, series worked out of logged ones, and the entropy target of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stare_megatron.compare.load import Run, Series
from stare_megatron.config.methods import METHODS
from stare_megatron.metrics.catalogue import entry


@dataclass(frozen=True)
class Info:
    """A metric: unit as in the catalogue, meaning as a sentence."""

    name: str
    unit: str
    meaning: str


_DERIVED = {
    info.name: info
    for info in (
        Info("all_correct_fraction", "fraction", "groups/all_correct / groups/sampled of the step."),
        Info("none_correct_fraction", "fraction", "groups/none_correct / groups/sampled of the step."),
        Info("dropped_fraction", "fraction", "groups/dropped / groups/sampled of the step."),
        Info("gate_duty", "fraction", "Share of the run's steps up to this one at which the gate was open."),
    )
}


def info(name: str) -> Info:
    """Of a derived metric, or of one of the catalogue and its families; a foreign name has no unit."""
    if name in _DERIVED:
        return _DERIVED[name]
    try:
        found = entry(name)
    except ValueError:
        return Info(name, "", "Not in this version's catalogue of metrics.")
    return Info(name, found.unit, found.meaning)


def evaluations(names: Iterable[str]) -> list[str]:
    """The `eval/` metrics to show, each once, in the order given; the ends of confidence intervals are not among
    them."""
    return [n for n in dict.fromkeys(names) if n.startswith("eval/") and not n.endswith(("/ci_low", "/ci_high"))]


def series(run: Run, name: str) -> Series | None:
    """A logged or derived series, float64 [steps]; None when the run lacks it."""
    if name in run.series:
        return run.series[name]
    if name in ("all_correct_fraction", "none_correct_fraction", "dropped_fraction"):
        part, whole = run.series.get(f"groups/{name.removesuffix('_fraction')}"), run.series.get("groups/sampled")
        if part is None or whole is None:
            return None
        return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    if name == "gate_duty" and steered(run) and "stare/gate" in run.series:
        gate = run.series["stare/gate"]
        seen = np.cumsum(np.isfinite(gate))
        return np.divide(np.nancumsum(gate), seen, out=np.full(len(gate), np.nan), where=seen > 0)
    return None


def steered(run: Run) -> bool:
    """Whether the run's method acts on its entropy target; also when nothing is known of the method. For the others
    the logged target is a line to compare with."""
    method = run.settings.get("algorithm.method")
    return method not in METHODS or METHODS[str(method)].seeks_target


def target(run: Run, reference: float | None) -> Series | None:
    """H_tgt of each step, nats; None when there is none.

    Args:
        reference: for runs whose method does not act on a target, instead of the one they logged; nats.
    """
    if reference is not None and (not steered(run) or "policy/target_entropy" not in run.series):
        return np.full(len(run.steps), reference)
    return run.series.get("policy/target_entropy")
