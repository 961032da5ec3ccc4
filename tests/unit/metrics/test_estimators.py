"""pass@k against plain counting, and what the intervals cover."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from stare_megatron.metrics.estimators import Estimate, estimate, pass_at_k, powers_of_two


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_counts_the_draws_that_hold_a_correct_one(n):
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            assert pass_at_k(n, c, k) == sum(map(any, draws)) / len(draws)


def test_pass_at_k_is_rounded_once():
    """Products of floats lose digits, and binomials of floats overflow, where this does not."""
    for n, c, k in ((10_000, 1, 3), (2_000, 1_999, 1_000), (5_000, 17, 256)):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == float(exact)
    assert pass_at_k(10_000, 1, 3) == 3e-4


def test_pass_at_k_is_unbiased():
    """Its mean over all outcomes of n samples is the probability that k fresh ones hold a correct one."""
    p, n = Fraction(3, 10), 6
    for k in range(1, n + 1):
        chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = math.fsum(float(q) * pass_at_k(n, c, k) for c, q in enumerate(chance))
        assert mean == pytest.approx(float(1 - (1 - p) ** k), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


def test_powers_of_two_end_at_k():
    assert powers_of_two(1) == (1,)
    assert powers_of_two(8) == (1, 2, 4, 8)
    assert powers_of_two(12) == (1, 2, 4, 8)


def test_the_interval_of_zeros_and_ones_is_wilsons():
    # Wilson's interval for 3 of 10 at 95 %, from its closed form worked out by hand.
    e = estimate([1.0] * 3 + [0.0] * 7, 0.95)
    assert (e.value, e.prompts) == (0.3, 10)
    assert (e.low, e.high) == (pytest.approx(0.10779, abs=1e-5), pytest.approx(0.60322, abs=1e-5))


def test_equal_prompts_do_not_make_a_point():
    for value in (0.0, 1.0, 0.25):
        e = estimate([value] * 20, 0.95)
        assert 0 <= e.low <= value <= e.high <= 1
        assert e.high - e.low > 0.1


def test_more_samples_of_the_same_prompts_do_not_pass_for_more_prompts():
    """Duplicated samples change nothing; duplicated prompts would."""
    values = [0.0, 0.5, 1.0, 0.25]
    assert estimate(values, 0.95) != estimate(values * 2, 0.95)
    assert estimate(values, 0.95).high - estimate(values, 0.95).low > 1.3 * (
        estimate(values * 2, 0.95).high - estimate(values * 2, 0.95).low
    )


def test_nothing_to_estimate_is_nan():
    assert [math.isnan(x) for x in (estimate([], 0.95).value, estimate([], 0.95).low)] == [True, True]
    assert isinstance(estimate([], 0.95), Estimate)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        estimate([0.5, 1.2], 0.95)


@pytest.mark.parametrize("samples", [1, 8, 32])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.7), (5.0, 5.0), (2.0, 1.0)])
def test_intervals_cover_the_mean_of_clustered_samples(a, b, samples):
    """Prompts of Beta(a, b) difficulty. An interval that took samples for independent would cover far less."""
    rng = np.random.default_rng(7)
    prompts, rounds, true = 30, 800, a / (a + b)
    covered = naive = 0
    for _ in range(rounds):
        values = rng.binomial(samples, rng.beta(a, b, prompts)) / samples
        e = estimate(values.tolist(), 0.95)
        covered += e.low <= true <= e.high
        naive += abs(values.mean() - true) < 1.96 * math.sqrt(true * (1 - true) / (prompts * samples))
    # 800 rounds: a standard error of 0.8 %.
    assert 0.91 <= covered / rounds <= 0.99
    if samples == 32:
        assert naive / rounds < 0.85
