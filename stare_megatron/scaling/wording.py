"""How results are written: numbers with their intervals, axes with their units, refusals as sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stare_megatron.scaling.curve import Curve, HeldOut, Unfinished
from stare_megatron.scaling.intervals import Estimate, Refusal
from stare_megatron.scaling.laws import PowerLaw, Reach
from stare_megatron.scaling.records import Axis, Trial

NOTHING = "–"


def axis_title(axis: Axis, trials: Sequence[Trial]) -> str:
    """With unit. Hours are named after what the runs ran on, and never mixed in silence."""
    if axis is Axis.HOURS:
        kinds = {t.gpu for t in trials}
        if kinds == {True}:
            return "GPU hours (GPUs x wall time of the steps)"
        if kinds == {False}:
            return "core hours (ranks and engines on CPUs x wall time of the steps; no GPU hours)"
        return "device hours (devices x wall time of the steps; of unlike or unknown devices)"
    return {
        Axis.FLOPS: "counted FLOPs (sampling, scoring and update)",
        Axis.TOKENS: "action tokens trained on",
        Axis.STEPS: "optimizer steps",
    }[axis]


def cost(value: float) -> str:
    """A cost in four digits or fewer."""
    return f"{value:,.0f}" if 100 <= value < 1e5 and value == round(value) else f"{value:.3g}"


def accuracy(e: Estimate | None) -> str:
    return NOTHING if e is None else _with_interval(e, lambda v: f"{v:.3f}")


def costs(e: Estimate | None) -> str:
    return NOTHING if e is None else _with_interval(e, cost)


def plain(e: Estimate | None) -> str:
    return NOTHING if e is None else _with_interval(e, lambda v: f"{v:.3g}")


def asymptote(curve: Curve | Unfinished | Refusal) -> str:
    return accuracy(curve.a) if isinstance(curve, Curve) else "refused"


def reason(found: Curve | Unfinished | HeldOut | Refusal | PowerLaw | Estimate) -> str:
    """Why it is refused; empty if it is not."""
    return found.reason if isinstance(found, Refusal | Unfinished) else ""


def held_out(found: HeldOut | Refusal) -> str:
    """In one line."""
    if isinstance(found, Refusal):
        return f"refused: {found.reason}"
    noise = f", noise of an evaluation {found.noise:.3f}" if found.noise else ""
    text = f"error {found.rmse:.3f} (bias {found.bias:+.3f}; repeating the last accuracy {found.carried:.3f}{noise})"
    return text if found.bent else f"{text}; the first half alone had not bent"


def reached(r: Reach) -> str:
    if not r.reached:
        return NOTHING
    if r.before == r.seeds:
        return "before the first step"
    text = costs(r.cost) if r.cost is not None else NOTHING
    return text if r.reached == r.seeds and not r.before else f"{text} ({r.reached} of {r.seeds} seeds{_before(r)})"


def _before(r: Reach) -> str:
    return f", {r.before} before the first step" if r.before else ""


def law(found: PowerLaw | Refusal) -> str:
    if isinstance(found, Refusal):
        return f"refused: {found.reason}"
    text = f"exponent {plain(found.alpha)} over {found.alpha.n} sizes, typical factor off {found.error:.2f}"
    if found.held_out is not None:
        text += f"; the largest size, predicted from the others: measured is {found.held_out:.2f} of it"
    return text


def _with_interval(e: Estimate, shown: Callable[[float], str]) -> str:
    if e.low is None or e.high is None:
        return f"{shown(e.value)} (one seed)" if e.n == 1 else shown(e.value)
    ends = [shown(v) if math.isfinite(v) else "∞" for v in (e.low, e.high)]
    return f"{shown(e.value)} [{ends[0]}, {ends[1]}]"
