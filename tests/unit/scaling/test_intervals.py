"""Student's t and the bootstrap over seeds, held to tables and to each other."""

import math

import numpy as np
import pytest

from stare_megatron.scaling.intervals import bootstrap_interval, mean_interval, resamples, t_quantile


@pytest.mark.parametrize(
    ("df", "want"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227), (100, 1.98397)],
)
def test_students_t_is_that_of_the_tables(df, want):
    assert t_quantile(df) == pytest.approx(want, abs=5e-5)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_the_bootstrap_of_a_mean_is_its_t_interval(seeds):
    values = np.random.default_rng(seeds).normal(size=seeds)
    counts, probable = resamples(seeds)
    assert probable.sum() == pytest.approx(1)
    assert np.all(counts.sum(1) == seeds)
    found = bootstrap_interval(float(values.mean()), counts @ values / seeds, probable, seeds)
    want = mean_interval(values.tolist())
    assert (found.low, found.high) == pytest.approx((want.low, want.high), rel=1e-12)


def test_resamples_of_many_seeds_are_drawn_and_always_the_same():
    first, second = resamples(9)[0], resamples(9)[0]
    assert first.shape == (500, 9)
    assert np.array_equal(first, second)
    assert np.all(first.sum(1) == 9)


def test_one_seed_has_no_interval():
    assert mean_interval([0.4]).low is None
    assert bootstrap_interval(0.4, np.array([0.4]), np.array([1.0]), 1).high is None


def test_an_interval_is_cut_to_what_can_be():
    e = mean_interval([0.9, 1.0]).within(0.0, 1.0)
    assert e.high == 1.0
    assert e.low is not None
    assert math.isfinite(e.low)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
