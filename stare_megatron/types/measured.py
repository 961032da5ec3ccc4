"""A number on its way from where it is measured to the sinks."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """What one part of a step (its samples, a pass, an optimizer step, a process) adds to a metric.

    `name`: in `metrics/catalogue.py`, whose reduction makes one value of all parts with this name. A mean is the sum of
    the totals by the sum of the weights (samples, tokens, seconds). A count, a largest or a single value is `total`,
    with weight 1.

    Example:
        Measured("reward/mean", total=12.0, weight=16)
    """

    name: str
    total: float
    weight: float = 1

    @property
    def value(self) -> float:
        """The part's own mean; NaN without weight."""
        return self.total / self.weight if self.weight else math.nan


def mean(name: str, values: Collection[float]) -> Measured:
    """Every value with weight 1.

    Example:
        mean("reward/mean", [1.0, 0.0]) == Measured("reward/mean", 1.0, 2)
    """
    return Measured(name, sum(values), len(values))


@dataclass(frozen=True)
class Measurements:
    """What was measured of one thing, each name once; `x["update/loss"]` is a part's value."""

    measured: tuple[Measured, ...]

    def part(self, name: str) -> Measured:
        """Raises:
        KeyError: it was not measured."""
        for part in self.measured:
            if part.name == name:
                return part
        raise KeyError(name)

    def __getitem__(self, name: str) -> float:
        return self.part(name).value
