"""How a model stretches its rotary embedding to contexts longer than it was first trained on. Pure Python."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """`rope_type = "linear"`: every wave `factor` times as long."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """`rope_type = "llama3"`: long waves `factor` times as long, short ones as they were."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Yarn:
    """`rope_type = "yarn"` (arXiv 2309.00071): waves that turn more than `beta_fast` times in the original context
    stay, those that turn less than `beta_slow` times get `factor` times as long; queries and keys are multiplied by
    `attention`.

    `truncate`: the two bounds, in dimensions, are rounded outwards.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention: float


RopeScaling = Linear | Llama3 | Yarn


def yarn_attention(factor: float) -> float:
    """The scale of queries and keys that the paper recommends (its equation 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
