"""The warning about a controller that is too strong for old samples: given once, and only where there is cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stare_megatron.run.gain_watch import GainWatch
from stare_megatron.types import Control
from tests.configs import configuration

STARE = {"controller": "proportional_integral", "weight_pos": 3.0, "kp": 15.0}
AHEAD: dict[str, Any] = {
    "sampling": {"mode": "stream", "max_staleness": 2},
    "inference": {"placement": "separate"},
    "algorithm": {"method": "stare", "stare": STARE, "correction": {"mode": "truncate"}},
}


def notes(changes: dict[str, Any], k: float, steps: int = 60) -> list[str]:
    """What is said of a run whose entropy answers by k to weights that wander."""
    said: list[str] = []
    watch, rng, entropy = GainWatch(configuration(**changes), said.append), np.random.default_rng(0), 0.3
    for _ in range(steps):
        u = float(rng.random())
        watch.saw(Control(gate_on=True, weight_pos=1 + u, weight_neg=1.0, entropy=entropy, target=0.3))
        entropy += k * (u - 0.5)
    return said


def test_it_is_said_once():
    (said,) = notes(AHEAD, k=0.02)
    assert "try algorithm.stare.kp = 8.3" in said


@pytest.mark.parametrize(
    ("changes", "k"),
    [
        (AHEAD, 0.01),
        ({"algorithm": {"method": "stare", "stare": STARE}}, 0.02),
        (AHEAD | {"algorithm": {"method": "grpo", "correction": {"mode": "truncate"}}}, 0.02),
    ],
    ids=["weak", "sync", "no gate"],
)
def test_nothing_is_said_without_cause(changes, k):
    assert notes(changes, k) == []
