"""avg@k, unbiased pass@k, an interval for a mean over prompts, and the moving average of a series."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@functools.lru_cache(maxsize=65536)
def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a correct one when c of the n are correct.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of pass@k of Chen et al. 2021 (arXiv 2107.03374, eq. 1), computed
    in whole numbers and rounded once.

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n = {n}, c = {c}, k = {k}")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws


def powers_of_two(k: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to k."""
    return tuple(2**i for i in range(k.bit_length()))


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its confidence interval; NaN without prompts.

    Example:
        Estimate(value=0.31, low=0.24, high=0.39, prompts=30)
    """

    value: float
    low: float
    high: float
    prompts: int


def estimate(values: Sequence[float], confidence: float) -> Estimate:
    """The mean of one value in [0, 1] a prompt, with a Wilson interval over an effective sample size.

    Samples of one prompt are alike, so prompts, not samples, are what is independent: the variance s^2 / N of the mean
    is taken from the spread s^2 of the prompts' values, and n = m (1 - m) / (s^2 / N) independent trials have the same
    variance (the design effect of clustered samples). Wilson's interval (1927) for a share m of n trials stays in
    [0, 1] and does not shrink to a point when every prompt has the same value; n is then N. It covers what other
    prompts of the same kind would give, on average, with new samples.

    Raises:
        ValueError: a value outside [0, 1].
    """
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    if min(values) < 0 or max(values) > 1:
        raise ValueError(f"values must be in [0, 1], got {min(values)} to {max(values)}")
    mean = math.fsum(values) / count
    spread = math.fsum((x - mean) ** 2 for x in values)
    trials = float(count)
    if count > 1 and spread > 0 and 0 < mean < 1:
        # Never fewer trials than prompts: values in [0, 1] cannot spread more than zeros and ones do.
        trials = max(trials, mean * (1 - mean) * count * (count - 1) / spread)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(mean * (1 - mean) / trials + z * z / (4 * trials * trials))
    return Estimate(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)), count)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each position, those not finite left out; NaN where none is finite.

    Window 1 gives the values themselves.
    """
    if window == 1:
        return values
    finite = np.isfinite(values)
    means = np.full(len(values), np.nan)
    for i in range(len(values)):
        part = slice(max(0, i + 1 - window), i + 1)
        if finite[part].any():
            means[i] = values[part][finite[part]].mean()
    return means
