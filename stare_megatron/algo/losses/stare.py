"""STARE (arXiv 2606.19236, the reweighted objective): GRPO's per-token loss times the token weight of `algo.stare`.

loss = w * correction * l        w = 1 everywhere while the gate is shut, which is GRPO
"""

from __future__ import annotations

import dataclasses

from stare_megatron.algo.losses.grpo import grpo_loss
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.config import AlgorithmConfig


def stare_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    plain = grpo_loss(tokens, config)
    return dataclasses.replace(plain, loss_T=plain.loss_T * tokens.weight_T)
