"""Sigmoids: known parameters come back with honest intervals, and what the points do not say is refused."""

import numpy as np
import pytest

from stare_megatron.scaling.curve import Curve, HeldOut, Unfinished, fit_curve, hold_out
from stare_megatron.scaling.intervals import Refusal
from stare_megatron.scaling.sigmoid import Points, bounds, compute_for, fit, predict
from tests.unit.scaling.synthetic import MID, R0, A, B, draw

TRUE = np.array([R0, A, np.log(MID), np.log(B)])


def exact(top=8.0, seeds=1):
    x = np.tile(np.concatenate([[0.0], np.linspace(top / 12, top, 12) * MID]), seeds)
    return Points(x, predict(TRUE, x), np.zeros(len(x)), np.repeat(np.arange(seeds), 13))


def coverage(draws, seeds):
    rng = np.random.default_rng(20261128)
    inside, told = np.zeros(3), 0
    for _ in range(draws):
        curve = fit_curve(draw(rng, seeds))
        if isinstance(curve, Curve):
            told += 1
            found = ((curve.a, A), (curve.mid, MID), (curve.b, B))
            inside += [e.low <= true <= e.high for e, true in found]
    assert told >= 0.95 * draws, "a curve up to eight times C_mid has bent"
    return inside / told


def test_intervals_cover_in_a_hundred_draws():
    # 0.88: what 0.93 becomes less two standard errors of a hundred draws.
    assert np.all(coverage(100, seeds=3) >= 0.88)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seeds", [3, 4])
def test_intervals_cover_in_90_to_98_percent_of_500_draws(seeds):
    share = coverage(500, seeds)
    assert np.all((share >= 0.90) & (share <= 0.98)), share


def test_without_noise_the_parameters_come_back():
    curve = fit_curve(exact())
    assert isinstance(curve, Curve)
    assert curve.theta == pytest.approx(TRUE, abs=1e-4)
    assert curve.a.low is None, "one seed has no interval"
    assert compute_for(curve.theta, (A + R0) / 2) == pytest.approx(MID, rel=1e-3)
    assert np.isnan(compute_for(curve.theta, 0.9))


def test_derivatives_are_those_of_the_prediction():
    from stare_megatron.scaling import sigmoid

    points, step = exact(), 1e-6
    jacobian, _ = sigmoid._linear(points, TRUE[None])
    for i in range(4):
        up, down = TRUE.copy(), TRUE.copy()
        up[i] += step
        down[i] -= step
        assert jacobian[0, :, i] == pytest.approx(
            (predict(up, points.x) - predict(down, points.x)) / 2 / step, abs=1e-7
        )


def test_weights_of_nothing_leave_a_point_out():
    points = exact()
    wrong = Points(points.x, points.y + np.where(np.arange(13) == 5, 0.3, 0.0), points.se, points.seed)
    weights = np.where(np.arange(13) == 5, 0.0, 1.0)[None]
    theta, loss = fit(wrong, weights, bounds(points.x, 1), np.empty((0, 4)))
    assert predict(theta[0], points.x) == pytest.approx(points.y, abs=1e-4)
    assert loss[0] < 1e-8


def test_a_curve_that_has_not_bent_is_refused_with_the_asymptotes_it_allows():
    curve = fit_curve(draw(np.random.default_rng(3), seeds=3, top=0.7))
    assert isinstance(curve, Unfinished)
    assert "has not bent" in curve.reason
    assert curve.profile.high - curve.profile.low > 0.1


def test_a_flat_curve_is_refused():
    points = exact()
    y = 0.3 + np.random.default_rng(0).normal(0, 0.01, 13)
    curve = fit_curve(Points(points.x, y, points.se, points.seed))
    assert isinstance(curve, Refusal)
    assert "flat" in curve.reason


@pytest.mark.parametrize("accuracy", [0.0, 0.25, 1.0])
def test_the_same_accuracy_throughout_is_flat(accuracy):
    """As of a model that never answers right: no sigmoid fits better than exactly."""
    points = exact()
    curve = fit_curve(Points(points.x, np.full(13, accuracy), points.se, points.seed))
    assert isinstance(curve, Refusal)
    assert "flat" in curve.reason


def test_a_falling_curve_is_refused():
    points = exact()
    curve = fit_curve(Points(points.x, 0.8 - points.y, points.se, points.seed))
    assert isinstance(curve, Refusal)
    assert "falls" in curve.reason


def test_too_few_evaluations_are_refused():
    points = exact().where(np.arange(13) < 5)
    assert isinstance(fit_curve(points), Refusal)
    assert isinstance(hold_out(points), Refusal)
    nothing = points.where(points.x == 0)
    assert "eval.every" in fit_curve(nothing).reason


def test_the_rest_is_foretold_from_the_first_half():
    found = hold_out(draw(np.random.default_rng(5), seeds=3))
    assert isinstance(found, HeldOut)
    assert found.n == 18
    assert found.rmse < 0.05 < found.carried + 0.05
    assert found.noise == pytest.approx(0.0145, abs=0.002)


def test_what_was_held_out_is_not_looked_at():
    points = exact(seeds=2)
    late = points.x > 4 * MID
    moved = Points(points.x, np.where(late, points.y + 0.1, points.y), points.se, points.seed)
    assert hold_out(moved).bias - hold_out(points).bias == pytest.approx(-0.1, abs=1e-6)
