"""What runs are laid side by side along, and the mean over the seeds of a group.

`report.js` does the same in the browser, for the alignment and window chosen there; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from stare_megatron.compare.load import Run


class Align(Enum):
    STEP = "step"
    TOKENS = "tokens"
    TIME = "time"


@dataclass(frozen=True)
class Axis:
    """`title`: with its unit."""

    align: Align
    name: str
    title: str


AXES = {
    Align.STEP: Axis(Align.STEP, "step", "optimizer step"),
    Align.TOKENS: Axis(Align.TOKENS, "trained tokens", "action tokens trained on"),
    Align.TIME: Axis(Align.TIME, "wall-clock", "wall-clock time of all steps, minutes"),
}


def position(run: Run, align: Align) -> np.ndarray | None:
    """Where each step of a run lies, float64 [steps]; None when the run lacks the metric for it.

    Step: its number. Tokens: `throughput/trained_tokens_total`. Time: the sum of `time/step` up to and including the
    step, minutes, over all starts; what passes before a start's first step (loading, engines) is not in it.
    """
    if align is Align.STEP:
        return run.steps.astype(np.float64)
    if align is Align.TOKENS:
        return run.series.get("throughput/trained_tokens_total")
    seconds = run.series.get("time/step")
    return None if seconds is None else np.cumsum(seconds) / 60.0


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]], align: Align) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs, given x and y of each, only where every run has a finite value.

    By step: at the steps all runs share. Otherwise, as no two runs share positions: at evenly spaced ones, as many as
    the longest run has points, from the last of the runs' first points to the first of their last; each run is
    interpolated linearly between its neighbouring points.
    """
    kept = [(x[ok], y[ok]) for x, y in curves for ok in [np.isfinite(x) & np.isfinite(y)]]
    empty = np.array([]), np.array([])
    if not kept or any(len(x) == 0 for x, _ in kept):
        return empty
    if align is Align.STEP:
        shared = sorted(set.intersection(*({float(v) for v in x} for x, _ in kept)))
        at = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in kept]
        return np.array(shared), np.array([sum(a[s] for a in at) / len(at) for s in shared])
    low, high = max(x[0] for x, _ in kept), min(x[-1] for x, _ in kept)
    if low > high:
        return empty
    points = max(len(x) for x, _ in kept)
    grid = np.linspace(low, high, points) if points > 1 and high > low else np.array([low])
    return grid, np.mean([np.interp(grid, x, y) for x, y in kept], axis=0)
