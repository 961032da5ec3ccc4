"""GRPO with an entropy bonus of fixed coefficient (arXiv 1602.01783, section 4; arXiv 1707.06347, equation 9).

loss = correction * l - coefficient * H        H: entropy of the policy being updated, through which the gradient runs
"""

from __future__ import annotations

import dataclasses

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.grpo import grpo_loss
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.config import AlgorithmConfig


def with_bonus(plain: TokenLoss, tokens: LossInputs, coefficient: float) -> TokenLoss:
    """`plain` less coefficient times entropy."""
    return dataclasses.replace(plain, loss_T=plain.loss_T - coefficient * tokens.entropy_T)


def entropy_bonus_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    return with_bonus(grpo_loss(tokens, config), tokens, config.entropy_bonus.coefficient)


ALGORITHM = Algorithm(entropy_bonus_loss, entropy_gradient=True)
