"""GRPO with an entropy bonus whose coefficient seeks a target entropy (Skywork-OR1, arXiv 2505.22312, eq. 3.2).

loss = correction * l - a_k H
a_k = c_k where H_k <= H_tgt, else 0;   c_{k+1} = clip(c_k + step sign(H_tgt - H_k), 0, maximum);   c_0 = 0

H_k: mean entropy of step k's batch under the policy about to be updated. c is state, and in the checkpoint.
"""

from __future__ import annotations

import dataclasses

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.controller import ControllerState, observe_without_gate
from stare_megatron.algo.losses.entropy_bonus import with_bonus
from stare_megatron.algo.losses.grpo import grpo_loss
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import Control, EntropyReading


def adaptive_entropy_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    return with_bonus(grpo_loss(tokens, config), tokens, tokens.control.entropy_coefficient)


def observe(
    config: AlgorithmConfig, state: ControllerState, reading: EntropyReading
) -> tuple[ControllerState, Control]:
    """This step's coefficient, and the state with the next one.

    Raises:
        RunError: the entropy is not finite.
    """
    settings = config.adaptive_entropy
    state, control = observe_without_gate(config, state, reading)
    gap = settings.target_entropy - reading.entropy
    used = state.entropy_coefficient if gap >= 0 else 0.0
    moved = state.entropy_coefficient + settings.step * ((gap > 0) - (gap < 0))
    following = dataclasses.replace(state, entropy_coefficient=min(max(moved, 0.0), settings.maximum))
    return following, dataclasses.replace(control, target=settings.target_entropy, entropy_coefficient=used)


ALGORITHM = Algorithm(adaptive_entropy_loss, controller=observe, entropy_gradient=True)
