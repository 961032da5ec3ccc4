"""The target-entropy gate and its adaptive schedule (arXiv 2606.19236): entropy in, `Control` out, once a step.

The state is a frozen value: the loop keeps it, the checkpoint holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stare_megatron.config import AlgorithmConfig
from stare_megatron.errors import RunError
from stare_megatron.types import Control


@dataclass(frozen=True)
class ControllerState:
    """Weights W and M, and the coefficient of an entropy bonus, after the last step.

    `dataclasses.asdict` writes it, `ControllerState(**d)` reads it.

    Example:
        ControllerState(weight_pos=1.11, weight_neg=0.89)
    """

    weight_pos: float
    weight_neg: float
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.weight_pos, self.weight_neg, self.entropy_coefficient))):
            raise ValueError(f"controller state must be finite: {self}")


def initial(config: AlgorithmConfig) -> ControllerState:
    """The state before the first step. The first gate is decided by the first batch, not assumed open."""
    return ControllerState(config.stare.weight_pos, config.stare.weight_neg)


def observe(config: AlgorithmConfig, state: ControllerState, entropy: float) -> tuple[ControllerState, Control]:
    """The gate of this step from the batch's mean entropy H, nats, under the policy about to be updated.

    gate_on = H < H_tgt. Adaptive, with sign(0) = 0: W <- clip(W + alpha sign(H_tgt - H), 1, W_max),
    M <- clip(M - alpha sign(H_tgt - H), M_min, 1); the new values hold for this very step. Proportional: this step's
    weights are 1 + u (W - 1) and 1 + u (M - 1), u = min(1, (H_tgt - H) / (band H_tgt)), so that they do not jump at the
    target; W, M stay.

    Raises:
        RunError: H is not finite.
    """
    stare = config.stare
    if not math.isfinite(entropy):
        raise RunError(f"the update batch's mean entropy is {entropy}; the gate cannot be decided")
    if stare.adaptive:
        gap = stare.target_entropy - entropy
        step = stare.alpha * ((gap > 0) - (gap < 0))
        state = ControllerState(
            weight_pos=min(max(state.weight_pos + step, 1.0), stare.weight_pos_max),
            weight_neg=min(max(state.weight_neg - step, stare.weight_neg_min), 1.0),
        )
    gate_on = entropy < stare.target_entropy
    weight_pos, weight_neg = state.weight_pos, state.weight_neg
    if stare.controller == "proportional" and gate_on:
        strength = min(1.0, (stare.target_entropy - entropy) / (stare.band * stare.target_entropy))
        weight_pos, weight_neg = 1.0 + strength * (weight_pos - 1.0), 1.0 + strength * (weight_neg - 1.0)
    return state, Control(gate_on, weight_pos, weight_neg, entropy, stare.target_entropy)


def observe_without_gate(
    config: AlgorithmConfig, state: ControllerState, entropy: float
) -> tuple[ControllerState, Control]:
    """For methods without a gate: never on, weights 1. The configured target is kept as a line to plot against.

    Raises:
        RunError: H is not finite.
    """
    if not math.isfinite(entropy):
        raise RunError(f"the update batch's mean entropy is {entropy}")
    return state, Control(False, 1.0, 1.0, entropy, config.stare.target_entropy)
