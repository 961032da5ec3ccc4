import math

import pytest

from stare_megatron.compare.stats import band, spread


def test_band_by_hand():
    """Target 1, band 0.7 to 1.3. First inside at step 3; after it 3 of 6 steps lie inside."""
    found = band([2.0, 1.4, 1.25, 1.0, 1.5, 1.4, 0.9, 0.6, 0.8], 1.0)
    assert (found.first_step, found.steps_after) == (3, 6)
    assert found.share_in_band == 3 / 6
    assert found.overshoot == pytest.approx(0.2)
    assert band([1.0, 0.5, 1.4], 1.0).overshoot == pytest.approx(0.2), "below the band, further than above it"
    errors = [0.0, 0.5, 0.4, -0.1, -0.4, -0.2]
    assert found.rms_error == pytest.approx(math.sqrt(sum(e * e for e in errors) / 6))
    assert found.longest_outside == 2


def test_the_first_step_inside_is_not_counted_and_the_edge_is_inside():
    found = band([4.0, 2.5, 0.1], 2.0, tolerance=0.25)
    assert found.first_step == 2, "2.5 is 2.0 + 0.25 * 2.0"
    assert (found.steps_after, found.share_in_band) == (1, 0.0)


def test_a_band_never_reached_has_no_numbers():
    found = band([1.0, 0.9, 0.8], 0.2)
    assert found.first_step is None
    assert math.isnan(found.share_in_band)
    assert math.isnan(found.overshoot)
    assert found.steps_after == 0


def test_reached_at_the_last_step_leaves_nothing_to_count():
    found = band([1.0, 0.2], 0.2)
    assert (found.first_step, found.steps_after) == (2, 0)
    assert math.isnan(found.share_in_band)


def test_a_target_that_moves_and_steps_without_a_value():
    entropies = [1.0, 0.5, math.nan, 0.25, 0.25]
    targets = [1.0, 0.5, 0.4, 0.25, math.nan]
    found = band(entropies, targets, steps=[10, 20, 30, 40, 50])
    assert (found.first_step, found.steps_after, found.share_in_band) == (10, 2, 1.0)
    assert found.overshoot == 0
    assert band(entropies, 1.0, steps=[10, 20, 30, 40, 50]).share_in_band == 0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        band([1.0, 2.0], [1.0])


def test_spread_leaves_out_runs_without_a_value():
    found = spread({"a": 1.0, "b": None, "c": 3.0})
    assert (found.n, found.mean, found.std) == (2, 2.0, math.sqrt(2))
    assert dict(found.values) == {"a": 1.0, "c": 3.0}
    assert (spread({"a": 5.0}).mean, spread({"a": 5.0}).std) == (5.0, None)
    assert (spread({"a": None}).n, spread({"a": None}).mean) == (0, None)
    assert spread({"a": 0.2, "b": 0.2, "c": 0.2}).std == 0
