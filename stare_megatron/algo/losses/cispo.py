"""CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): REINFORCE under a clipped, detached importance weight.

loss = -correction * stop_gradient(clip(r, 1 - eps_low, 1 + eps_high)) * A * logp        no token loses its gradient
"""

from __future__ import annotations

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.algo.surrogate import importance_ratio
from stare_megatron.config import AlgorithmConfig


def cispo_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    ratio_T = importance_ratio(tokens.logprob_T, tokens.old_logprob_T).detach()
    bounded_T = ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss_T = -bounded_T * tokens.advantage_T * tokens.logprob_T * tokens.correction_T
    return TokenLoss(loss_T, ratio_T, bounded_T != ratio_T)


ALGORITHM = Algorithm(cispo_loss)
