"""The response of the entropy is found in a record, and a gain that is too strong for the delay is told."""

from __future__ import annotations

import numpy as np
import pytest

from stare_megatron.algo.gain import BOUND, proportional_gain, response, too_strong
from stare_megatron.config import StareConfig

TARGET = 0.3


def record(kp: float, k: float, delay: int, steps: int = 400, noise: float = 2e-4) -> tuple[list[float], list[float]]:
    """Entropy and strength of a loop whose weights act `delay` steps late, against a drift that pulls it down."""
    rng = np.random.default_rng(3)
    entropy, strength = [TARGET - 0.05], []
    for t in range(steps):
        strength.append(min(max(kp * (TARGET - entropy[-1]), 0.0), 5.0))
        late = strength[t - delay] if t >= delay else 0.0
        entropy.append(entropy[-1] - 0.01 + k * late + noise * rng.standard_normal())
    return entropy[:-1], strength


@pytest.mark.parametrize("k", [0.02, 0.12])
def test_the_response_is_found(k):
    assert response(*record(kp=0.4 / k, k=k, delay=0)) == pytest.approx(k, rel=0.2)


def test_a_record_that_does_not_tell_gives_nothing():
    entropy, strength = record(kp=5.0, k=0.1, delay=0)
    assert response(entropy[:20], strength[:20]) is None
    assert response(entropy, [0.0] * len(entropy)) is None
    noise = np.random.default_rng(1).standard_normal(400)
    assert response(noise.cumsum().tolist(), np.random.default_rng(2).random(400).tolist()) is None


@pytest.mark.parametrize("delay", [0, 1, 2, 4])
def test_within_the_bound_the_loop_is_calm_and_well_beyond_it_swings(delay):
    """What the bound is worth, in the loop that it is derived from."""
    k = 0.1

    def swing(product: float) -> float:
        entropy, _ = record(kp=product / (k * (delay + 1)), k=k, delay=delay, steps=2000)
        return max(entropy[-500:]) - min(entropy[-500:])

    assert swing(BOUND) < 0.01
    assert swing(6 * BOUND) > 3 * swing(BOUND)


def test_a_gain_beyond_the_bound_is_told_with_the_cure():
    stare = StareConfig(controller="proportional_integral", weight_pos=3.0, kp=15.0)
    assert proportional_gain(stare) == 15.0
    assert too_strong(stare, k=0.01, delay=2) == ""
    told = too_strong(stare, k=0.02, delay=2)
    assert "that is 0.9; above 0.5" in told
    assert "try algorithm.stare.kp = 8.3" in told
    band = StareConfig(controller="proportional", weight_pos=3.0, band=0.2, target_entropy=0.2)
    assert proportional_gain(band) == pytest.approx(50.0)
    assert "try algorithm.stare.band = 1.2" in too_strong(band, k=0.02, delay=2)
    assert proportional_gain(StareConfig()) == 0.0
    assert too_strong(StareConfig(), k=9.0, delay=9) == ""
