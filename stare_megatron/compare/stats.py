"""The numbers: how well an entropy keeps to its band, and mean and spread of a value over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 0.3


@dataclass(frozen=True)
class Band:
    """How an entropy keeps to the band |H - H_tgt| <= tolerance * H_tgt.

    "After" below means: at steps later than `first_step`, the first step inside the band. Steps whose entropy or
    target is not finite are left out everywhere. Where there is no such step a share, excess or error is NaN.

    first_step: the first step inside; None if there is none.
    steps_after: steps after it.
    share_in_band: share of the steps after it that lie inside.
    overshoot: the largest distance from the nearest edge of the band after it, nats; 0 if none lies outside.
    rms_error: root mean square of H - H_tgt after it, nats.
    longest_outside: the longest unbroken row of steps outside the band after it.
    """

    first_step: int | None
    steps_after: int
    share_in_band: float
    overshoot: float
    rms_error: float
    longest_outside: int


def band(
    entropies: Sequence[float],
    targets: Sequence[float] | float,
    steps: Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
) -> Band:
    """Measure a run's entropy against its target.

    Args:
        entropies: nats per token, one per step.
        targets: H_tgt, nats per token, one per step or one for all.
        steps: the steps' numbers; 1, 2, ... if not given.
        tolerance: half the band's width as a share of H_tgt.

    Raises:
        ValueError: the lengths differ.
    """
    goals = [float(targets)] * len(entropies) if isinstance(targets, int | float) else list(targets)
    numbers = list(range(1, len(entropies) + 1)) if steps is None else list(steps)
    points = [
        (int(n), float(h), float(t))
        for n, h, t in zip(numbers, entropies, goals, strict=True)
        if math.isfinite(h) and math.isfinite(t)
    ]
    inside = [abs(h - t) <= tolerance * t for _, h, t in points]
    if True not in inside:
        return Band(None, 0, *[math.nan] * 3, longest_outside=0)
    first = inside.index(True)
    after = points[first + 1 :]
    if not after:
        return Band(points[first][0], 0, *[math.nan] * 3, longest_outside=0)
    errors = [h - t for _, h, t in after]
    longest = row = 0
    for ok in inside[first + 1 :]:
        row = 0 if ok else row + 1
        longest = max(longest, row)
    return Band(
        first_step=points[first][0],
        steps_after=len(after),
        share_in_band=sum(inside[first + 1 :]) / len(after),
        overshoot=max(0.0, *(abs(h - t) - tolerance * t for _, h, t in after)),
        rms_error=math.sqrt(sum(e * e for e in errors) / len(errors)),
        longest_outside=longest,
    )


@dataclass(frozen=True)
class Spread:
    """A value over the runs of a group. `values`: run's name -> value, runs without one left out; `n`: how many.

    `mean`: None if n is 0. `std`: sample standard deviation (n - 1 in the denominator); None if n < 2.
    """

    values: Mapping[str, float]
    n: int
    mean: float | None
    std: float | None


def spread(values: Mapping[str, float | None]) -> Spread:
    """Mean and spread over runs; None means the run lacks the value, which then counts as absent and not as 0."""
    have = {name: value for name, value in values.items() if value is not None}
    numbers = list(have.values())
    mean = statistics.fmean(numbers) if numbers else None
    # In exact fractions: equal values have a spread of 0, and not of a rounding error.
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(have, len(numbers), mean, std)
