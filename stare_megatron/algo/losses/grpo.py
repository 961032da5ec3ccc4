"""GRPO (arXiv 2402.03300, equation 3, without the KL term) with DAPO's asymmetric clip and the dual clip.

r = exp(logp - old_logp)
l = max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high));   where A < 0: l = min(-A c, l)
loss = correction * l
"""

from __future__ import annotations

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.algo.surrogate import clipped_surrogate, importance_ratio
from stare_megatron.config import AlgorithmConfig


def grpo_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    ratio_T = importance_ratio(tokens.logprob_T, tokens.old_logprob_T)
    loss_T, clipped_T = clipped_surrogate(
        ratio_T,
        tokens.advantage_T,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    return TokenLoss(loss_T * tokens.correction_T, ratio_T.detach(), clipped_T)


ALGORITHM = Algorithm(grpo_loss)
