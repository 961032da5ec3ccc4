"""Covariance of advantage and log-prob, token by token, over an update batch spread across ranks.

arXiv 2505.22617, equation 10: cov(y) = (A - mean A) (logp - mean logp), means over all action tokens of the batch.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from stare_megatron.algo.comm import Comm
from stare_megatron.algo.reduce import FIXED_POINT_BITS, fixed_point_sum
from stare_megatron.algo.stare import Candidates


def token_covariance(tokens: Candidates, comm: Comm) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance float64 [T], 0 where a token is no action, and the number of action tokens, int64 []. A collective.

    The means are exact sums (`algo.reduce`), so the values are the same bits for every layout. A non-finite value has
    stopped the run before: the scoring pass is checked.
    """
    advantage_T, logprob_T = tokens.advantage_T[tokens.action_T], -tokens.surprisal_T[tokens.action_T]
    sums = torch.stack([fixed_point_sum(advantage_T), fixed_point_sum(logprob_T)])[:, 0]
    sums = comm.sum(torch.cat([sums, tokens.action_T.sum()[None]]))
    mean_advantage, mean_logprob = sums[:2].double() / (1 << FIXED_POINT_BITS) / sums[2].clamp(min=1)
    covariance_T = (tokens.advantage_T.double() - mean_advantage) * (-tokens.surprisal_T.double() - mean_logprob)
    return torch.where(tokens.action_T, covariance_T, 0.0), sums[2]


def share_of(fraction: float, n: torch.Tensor) -> torch.Tensor:
    """floor(fraction x n) in exact arithmetic, at least 1; int64. `fraction` as in `selection.top_count`."""
    exact = Fraction(repr(fraction)).limit_denominator(10**9)
    return (n * exact.numerator // exact.denominator).clamp(min=1)
