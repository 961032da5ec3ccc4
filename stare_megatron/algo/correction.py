"""Rollout correction: an importance weight for what engine and trainer disagree about on the sampled tokens.

x = log pi_trainer - log pi_engine of the policy that sampled, both at temperature 1
token: w = exp(x)    sequence: w = exp(sum of x over the sequence)    sequence-mean: w = exp(mean of x), its n-th root

truncate   w <- min(w, high)                             truncated importance sampling: Ionides 2008
mask       w <- w where low <= w <= high, 0 elsewhere    IcePop: arXiv 2510.18855

The weight has no gradient; it multiplies each token's loss. Denominators of the loss still count masked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stare_megatron.algo.losses.types import Sequences
from stare_megatron.algo.surrogate import MAX_LOG_RATIO
from stare_megatron.config import CorrectionConfig


@dataclass(frozen=True, eq=False)
class Correction:
    """`factor_T` float32 [T]: what multiplies the loss; `bounded_T` bool: truncated or masked."""

    factor_T: torch.Tensor
    bounded_T: torch.Tensor


def correct(
    trainer_logprob_T: torch.Tensor,
    engine_logprob_T: torch.Tensor,
    sequences: Sequences,
    config: CorrectionConfig,
) -> Correction:
    """Factors of action tokens, [T] each. With a sequence level a collective over the ranks that share sequences."""
    if config.mode == "none":
        one_T = torch.ones_like(trainer_logprob_T)
        return Correction(one_T, torch.zeros_like(one_T, dtype=torch.bool))
    x_T = (trainer_logprob_T - engine_logprob_T).detach().double()
    if config.level == "sequence":
        x_T = sequences.sum(x_T)
    elif config.level == "sequence-mean":
        x_T = sequences.mean(x_T)
    ratio_T = torch.exp(x_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    if config.mode == "truncate":
        factor_T, bounded_T = ratio_T.clamp(max=config.high), ratio_T > config.high
    else:
        bounded_T = (ratio_T < config.low) | (ratio_T > config.high)
        factor_T = torch.where(bounded_T, 0.0, ratio_T)
    return Correction(factor_T.to(trainer_logprob_T.dtype), bounded_T)
