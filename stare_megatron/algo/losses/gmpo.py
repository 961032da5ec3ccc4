"""GMPO (arXiv 2507.20673): the geometric mean of the token ratios, each clipped in log space.

d = clamp(logp - old_logp, -20, 20)       x = d, or its clip to [-eps_low, eps_high] where that is smaller for A > 0 and
                                          larger for A < 0
R = exp(mean over the sequence of x)      loss of a sequence = -A R C, C the geometric mean of the correction
"""

from __future__ import annotations

import torch

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.algo.reduce import LENGTH_EPSILON
from stare_megatron.algo.surrogate import MAX_LOG_RATIO
from stare_megatron.config import AlgorithmConfig

TINY = 1e-10  # added to the correction before its logarithm: a masked token pulls its sequence's weight down


def gmpo_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    distance_T = (tokens.logprob_T - tokens.old_logprob_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    sign_T = torch.sign(tokens.advantage_T)
    bounded_T = distance_T.clamp(-config.clip_low, config.clip_high)
    x_T = sign_T * torch.minimum(sign_T * distance_T, sign_T * bounded_T)
    actions_T = tokens.sequences.sum(torch.ones_like(x_T))
    length_T = actions_T + LENGTH_EPSILON  # as the reference has it; in float32 it is the number of tokens
    ratio_T = torch.exp(tokens.sequences.sum(x_T) / length_T)
    correction_T = torch.exp(tokens.sequences.sum(torch.log(tokens.correction_T + TINY)) / length_T)
    value_T = (-tokens.advantage_T * ratio_T * correction_T).to(x_T.dtype)
    # x - x is 0, and its gradient, summed over the sequence, that of log R: the rule of the exponential.
    loss_T = value_T * (1.0 + (actions_T / length_T).to(x_T.dtype) * (x_T - x_T.detach()))
    clipped_T = (sign_T * bounded_T < sign_T * distance_T).detach()
    return TokenLoss(loss_T, ratio_T.to(x_T.dtype), clipped_T)


ALGORITHM = Algorithm(gmpo_loss)
