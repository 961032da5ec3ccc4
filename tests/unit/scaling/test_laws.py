"""Power laws, cost to reach an accuracy, and accuracy at equal cost."""

import numpy as np
import pytest

from stare_megatron.scaling import laws
from stare_megatron.scaling.intervals import Estimate, Refusal

SIZES = [3e4, 1.1e5, 4.9e5, 1.9e6]


def test_a_power_law_comes_back_exactly():
    law = laws.power_law(SIZES, [5 * n**-0.3 for n in SIZES])
    assert law.alpha.value == pytest.approx(0.3)
    assert law.k == pytest.approx(5)
    assert law.held_out == pytest.approx(1)
    assert law.error == pytest.approx(1)


def test_intervals_of_a_power_law_cover_in_90_to_98_percent_of_500_draws():
    rng, inside = np.random.default_rng(7), 0
    for _ in range(500):
        alpha = laws.power_law(SIZES, [5 * n**-0.3 * np.exp(rng.normal(0, 0.2)) for n in SIZES]).alpha
        inside += alpha.low <= 0.3 <= alpha.high
    assert 450 <= inside <= 490


def test_two_sizes_are_too_few():
    found = laws.power_law(SIZES[:2], [1.0, 2.0])
    assert isinstance(found, Refusal)
    assert "too few sizes" in found.reason or "2 sizes are too few" in found.reason
    assert isinstance(laws.power_law(SIZES, [1.0, 2.0, 0.0, 1.0]), Refusal)


def test_three_sizes_have_no_size_to_hold_out():
    assert laws.power_law(SIZES[:3], [3.0, 2.0, 1.0]).held_out is None


def test_the_exponent_along_runs_is_a_mean_over_seeds():
    x = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
    runs = [(x, np.concatenate([[0.1], 1 - 0.8 * x[1:] ** -alpha])) for alpha in (0.2, 0.3)]
    found = laws.error_law(runs)
    assert isinstance(found, Estimate)
    assert found.value == pytest.approx(0.25)
    assert found.n == 2
    assert isinstance(laws.error_law([(x[:3], np.array([0.1, 0.2, 0.3]))]), Refusal)


def test_isotonic_regression_pools_what_falls():
    assert laws.isotonic(np.array([0.1, 0.4, 0.2, 0.6])).tolist() == pytest.approx([0.1, 0.3, 0.3, 0.6])
    assert laws.isotonic(np.array([3.0, 2.0, 1.0])).tolist() == [2.0, 2.0, 2.0]


def test_a_lucky_evaluation_does_not_reach():
    x = np.arange(5.0)
    lucky = laws.reach([(x, np.array([0.1, 0.52, 0.2, 0.3, 0.4]))], 0.5)
    assert lucky.reached == 0
    assert lucky.cost is None
    steady = laws.reach([(x, np.array([0.0, 0.2, 0.4, 0.6, 0.8]))], 0.5)
    assert steady.cost.value == pytest.approx(2.5)


def test_what_the_start_has_already_costs_nothing_and_is_in_no_mean():
    x = np.array([0.0, 1.0, 2.0])
    found = laws.reach([(x, np.array([0.6, 0.7, 0.8])), (x, np.array([0.4, 0.6, 0.8]))], 0.5)
    assert (found.reached, found.before, found.seeds) == (2, 1, 2)
    assert found.cost.value == pytest.approx(0.5)


def test_accuracy_at_a_cost_is_never_extrapolated():
    near, far = (np.array([0.0, 2.0]), np.array([0.0, 0.4])), (np.array([0.0, 4.0]), np.array([0.0, 0.4]))
    assert laws.at_cost([near, far], 1.0).value == pytest.approx(0.15)
    assert laws.at_cost([near, far], 3.0) is None


def test_budgets_are_round_and_inside():
    assert laws.budgets(30.0, 3.0) == [5.0, 10.0, 20.0]
    assert laws.budgets(1.0, 0.0) == []
