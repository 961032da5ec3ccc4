"""How strongly the entropy answers to the weights, and whether a controller's gain suits a delay.

The loop is H(t + 1) = H(t) + a + K u(t - d): the weights add u = W - 1 at a step, their effect is seen d steps later.
With u = kp (target - H) it oscillates from kp K = 2 sin(pi / (2 (2d + 1))) on: 2, 1, 0.62, 0.35 for d = 0, 1, 2, 4. A
margin of 3.5 to 4 is left by kp K (d + 1) <= 0.5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from stare_megatron.config import StareConfig

BOUND = 0.5
_LEAST = 20  # steps
_CERTAIN = 3.0  # standard errors that K must be above 0


def response(entropy: Sequence[float], strength: Sequence[float]) -> float | None:
    """K, nats a step for each unit of u, by least squares of the changes of H on u; None where the record does not
    tell: too short, u hardly moved, or K within three standard errors of 0.

    Args:
        entropy: mean entropy H of the policy that each step changed, nats.
        strength: u, the weight of L+ in that step less 1.
    """
    if len(entropy) <= _LEAST:
        return None
    u, change = _centred(strength[:-1]), _centred([after - before for before, after in itertools.pairwise(entropy)])
    spread = sum(x * x for x in u)
    if spread < 1e-9:
        return None
    k = sum(x * y for x, y in zip(u, change, strict=True)) / spread
    rest = sum((y - k * x) ** 2 for x, y in zip(u, change, strict=True))
    error = math.sqrt(rest / (len(u) - 2) / spread)
    return k if k > _CERTAIN * error else None


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [x - mean for x in values]


def proportional_gain(stare: StareConfig) -> float:
    """What a nat below the target adds to u at once; 0 for a controller that has no such gain."""
    if stare.controller == "proportional_integral":
        return stare.kp
    if stare.controller == "proportional":
        return (stare.weight_pos - 1.0) / (stare.band * stare.target_entropy)
    return 0.0


def too_strong(stare: StareConfig, k: float, delay: int) -> str:
    """A line for the user where the gain is beyond the bound at a delay of so many steps, else ""."""
    gain = proportional_gain(stare)
    product = gain * k * (delay + 1)
    if product <= BOUND:
        return ""
    most = BOUND / (k * (delay + 1))
    cure = f"algorithm.stare.kp = {most:.2g}"
    if stare.controller == "proportional":
        cure = f"algorithm.stare.band = {(stare.weight_pos - 1.0) / (most * stare.target_entropy):.2g}"
    return (
        f"the entropy answers to the weights by {k:.2g} nats a step: times the controller's gain of {gain:.3g}, and "
        f"{delay + 1} for samples up to {delay} updates old, that is {product:.2g}; above {BOUND} entropy may swing "
        f"about its target: try {cure} (docs/sampling.md)"
    )
