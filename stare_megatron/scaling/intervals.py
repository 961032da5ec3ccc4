"""Estimates with intervals over few seeds: Student's t, and the bootstrap over seeds without random draws."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_EXACT_UP_TO = 6  # seeds: 462 resamples that differ
_DRAWS = 500  # of more seeds


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; `low` and `high` are None where there is none (a single seed). `n`: units."""

    value: float
    low: float | None
    high: float | None
    n: int

    def within(self, least: float, largest: float) -> Estimate:
        """The same with its interval cut to what the quantity can be."""
        if self.low is None or self.high is None:
            return self
        return Estimate(self.value, max(least, self.low), min(largest, self.high), self.n)


@dataclass(frozen=True)
class Refusal:
    """Why something is not said, a sentence."""

    reason: str


def t_quantile(df: int, level: float = LEVEL) -> float:
    """t with P(|T| < t) = level for Student's T of `df` >= 1 degrees of freedom.

    Source: closed forms of the distribution, Abramowitz and Stegun 26.7.3 and 26.7.4; inverted by bisection.
    """
    low, high = 0.0, 1.0
    while _inside(high, df) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, df) < level else (low, middle)
    return (low + high) / 2


def _inside(t: float, df: int) -> float:
    """P(|T| < t)."""
    angle = math.atan(t / math.sqrt(df))
    square = math.cos(angle) ** 2
    if df % 2:
        term = total = math.cos(angle) if df > 1 else 0.0
        for i in range(3, df - 1, 2):
            term *= square * (i - 1) / i
            total += term
        return 2 / math.pi * (angle + math.sin(angle) * total)
    term = total = 1.0
    for i in range(2, df - 1, 2):
        term *= square * (i - 1) / i
        total += term
    return math.sin(angle) * total


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed and its t interval; without spread for a single one.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("the mean of no values")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, None, len(values))
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    half = t_quantile(len(values) - 1) * error
    return Estimate(mean, mean - half, mean + half, len(values))


def resamples(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """The bootstrap over `seeds`: how often each is drawn, float64 [resamples, seeds], and how probable that is,
    float64 [resamples], of sum 1. All of them up to six seeds, so nothing is left to chance; beyond, 500 drawn from a
    fixed seed."""
    if seeds > _EXACT_UP_TO:
        drawn = np.random.default_rng(0).multinomial(seeds, [1 / seeds] * seeds, size=_DRAWS)
        return drawn.astype(np.float64), np.full(_DRAWS, 1 / _DRAWS)
    counts, probable = [], []
    for drawn in itertools.combinations_with_replacement(range(seeds), seeds):
        times = Counter(drawn)
        counts.append([times[i] for i in range(seeds)])
        ways = math.factorial(seeds) / math.prod(math.factorial(n) for n in times.values())
        probable.append(ways / seeds**seeds)
    return np.array(counts, dtype=np.float64), np.array(probable)


def bootstrap_interval(value: float, replicates: np.ndarray, probable: np.ndarray, seeds: int) -> Estimate:
    """An interval from the values that resamples of the seeds give, float64 [resamples].

    Percentiles of so few seeds are far too narrow. So their standard deviation, times sqrt(n / (n - 1)) for what
    resampling leaves out, is read with Student's t of n - 1 degrees of freedom: for a mean that is its t interval,
    exactly.
    """
    if seeds < 2:
        return Estimate(value, None, None, seeds)
    centre = float(probable @ replicates)
    spread = math.sqrt(max(0.0, float(probable @ (replicates - centre) ** 2)) * seeds / (seeds - 1))
    half = t_quantile(seeds - 1) * spread
    return Estimate(value, value - half, value + half, seeds)
