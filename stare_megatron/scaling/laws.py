"""Power laws by size, compute to reach an accuracy, and accuracy at equal compute: without a sigmoid, from the
evaluations themselves, and never beyond them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stare_megatron.scaling.intervals import Estimate, Refusal, mean_interval, t_quantile

LEAST_SIZES = 3
_LEAST_TO_HOLD_OUT = 4  # sizes


@dataclass(frozen=True)
class PowerLaw:
    """y = k x^-alpha. `n`: sizes (or seeds) the interval rests on; `error`: typical factor, exp of the rms residual
    of log y; `held_out`: y measured by y predicted at the largest x, fitted without it; None with fewer than four."""

    alpha: Estimate
    k: float
    error: float
    held_out: float | None


@dataclass(frozen=True)
class Reach:
    """Cost to reach an accuracy: `cost` over the seeds that do (a geometric mean), None if none does. `before`: seeds
    that have it before the first step, and which are in no mean; `reached`: of `seeds`, those included."""

    accuracy: float
    cost: Estimate | None
    reached: int
    before: int
    seeds: int

    @property
    def by_all(self) -> Estimate | None:
        """The cost where every seed has one: it gets there, and not before its first step."""
        return self.cost if self.reached == self.seeds and not self.before else None


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | Refusal:
    """Least squares of log y on log x; one point a size, the mean over its seeds.

    The sizes are what is independent: what sets one size apart (its shape, its learning rate) all of its seeds share.
    So the interval has as many degrees of freedom as sizes less two, whatever the number of seeds.
    """
    if len(x) < LEAST_SIZES:
        return Refusal(f"{len(x)} sizes are too few for a power law in size, which takes {LEAST_SIZES} or more")
    if min(y) <= 0:
        return Refusal("a value is 0, and a power law has none")
    slope, at, residual = _line(np.log(x), np.log(y))
    free = len(x) - 2
    logs = np.log(x)
    error = math.sqrt(float(np.sum(residual**2)) / free / float(np.sum((logs - logs.mean()) ** 2)))
    half = t_quantile(free) * error
    held_out = None
    if len(x) >= _LEAST_TO_HOLD_OUT:
        last = int(np.argmax(x))
        rest = [i for i in range(len(x)) if i != last]
        part, base, _ = _line(logs[rest], np.log(y)[rest])
        held_out = float(y[last] / math.exp(base + part * logs[last]))
    rms = math.sqrt(float(np.mean(residual**2)))
    return PowerLaw(Estimate(-slope, -slope - half, -slope + half, len(x)), math.exp(at), math.exp(rms), held_out)


def error_law(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate | Refusal:
    """The exponent of 1 - accuracy = k x^-alpha along a run: the mean over seeds of each one's least squares in logs.

    Args:
        runs: cost and accuracy of each, float64 [evaluations]; the evaluation before the first step is left out.
    """
    slopes = []
    for x, y in runs:
        kept = (x > 0) & (y < 1)
        if kept.sum() < LEAST_SIZES:
            return Refusal(f"a power law along a run takes {LEAST_SIZES} evaluations after the first step")
        slopes.append(-_line(np.log(x[kept]), np.log(1 - y[kept]))[0])
    return mean_interval(slopes)


def reach(runs: Sequence[tuple[np.ndarray, np.ndarray]], accuracy: float) -> Reach:
    """Where each seed's accuracy, made monotone by isotonic regression, crosses `accuracy`, linearly between
    evaluations.

    The first evaluation above it would be too early: of many noisy ones, one is lucky.
    """
    crossings = [at for x, y in runs if (at := _crossing(x, isotonic(y), accuracy)) is not None]
    logs = [math.log(at) for at in crossings if at > 0]
    before = len(crossings) - len(logs)
    if not logs:
        return Reach(accuracy, None, before, before, len(runs))
    e = mean_interval(logs)
    ends = [None if end is None else math.exp(min(end, 700.0)) for end in (e.low, e.high)]
    return Reach(accuracy, Estimate(math.exp(e.value), ends[0], ends[1], e.n), len(crossings), before, len(runs))


def at_cost(runs: Sequence[tuple[np.ndarray, np.ndarray]], cost: float) -> Estimate | None:
    """Accuracy at a cost, linearly between evaluations; None unless every seed was evaluated on both sides of it."""
    if any(not len(x) or not x.min() <= cost <= x.max() for x, _ in runs):
        return None
    return mean_interval([float(np.interp(cost, x, y)) for x, y in runs]).within(0.0, 1.0)


def budgets(largest: float, least: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two costs: round ones, chosen without a look at accuracies."""
    if least <= 0 or largest < least:
        return []
    powers = range(math.floor(math.log10(least)), math.floor(math.log10(largest)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if least <= m * 10.0**p <= largest]


def isotonic(y: np.ndarray) -> np.ndarray:
    """The closest rising sequence in least squares, float64 [n]: pool adjacent violators (Barlow et al. 1972)."""
    blocks: list[tuple[float, int]] = []
    for value in y.tolist():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(n, value) for value, n in blocks]) if blocks else y


def _crossing(x: np.ndarray, rising: np.ndarray, accuracy: float) -> float | None:
    above = np.flatnonzero(rising >= accuracy)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(x[0])
    share = (accuracy - rising[i - 1]) / (rising[i] - rising[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Slope, intercept and residuals of y on x."""
    dx = x - x.mean()
    slope = float(np.sum(dx * (y - y.mean())) / np.sum(dx**2))
    at = float(y.mean() - slope * x.mean())
    return slope, at, y - at - slope * x
