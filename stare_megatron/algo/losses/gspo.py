"""GSPO (arXiv 2507.18071, equations 5 to 7, 13 and 14): one importance ratio a sequence, clipped as a whole.

log s = mean over the sequence of (logp - old_logp), at most 10; its gradient reaches each token by its own logp
loss = correction * max(-A s, -A clip(s, 1 - eps_low, 1 + eps_high)),  reduced by the mean over sequences
"""

from __future__ import annotations

import torch

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.config import AlgorithmConfig

MAX_LOG_RATIO = 10.0  # of a sequence, as in verl


def gspo_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    mean_T = tokens.sequences.mean(tokens.logprob_T - tokens.old_logprob_T)
    log_ratio_T = tokens.logprob_T - tokens.logprob_T.detach() + mean_T
    ratio_T = torch.exp(log_ratio_T.clamp(max=MAX_LOG_RATIO))
    plain_T = -tokens.advantage_T * ratio_T
    bounded_T = -tokens.advantage_T * ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss_T = torch.maximum(plain_T, bounded_T) * tokens.correction_T
    return TokenLoss(loss_T, ratio_T.detach(), (bounded_T > plain_T).detach())


ALGORITHM = Algorithm(gspo_loss)
