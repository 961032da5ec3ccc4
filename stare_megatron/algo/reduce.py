"""From per-token losses to one number: a factor per token over ONE global denominator.

The loss of an update is the plain sum of factor x token loss over all tokens of all ranks and micro-batches, so that
micro-batch size, packing, DP, CP and PP cannot change the gradient.
"""

from __future__ import annotations

from typing import Literal

import torch

Reduction = Literal[
    "token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "sequence-mean-constant-length"
]

LENGTH_EPSILON = 1e-8  # verl adds it to a sequence's token count; kept so that its recorded losses are matched
FIXED_POINT_BITS = 24


def token_factors(
    reduction: Reduction,
    sequence_actions_T: torch.Tensor,
    *,
    num_action_tokens: int,
    num_sequences: int,
    constant_length: int = 0,
) -> torch.Tensor:
    """Factor of each token's loss in the sum, float [T] in the dtype of `sequence_actions_T`.

    `sequence_actions_T`: action tokens in the whole sequence that token t belongs to. `num_action_tokens`,
    `num_sequences` (sequences with at least one action token): of the whole update over all ranks.
    `constant_length`: tokens that stand for every sequence's length in "sequence-mean-constant-length" (Dr. GRPO,
    arXiv 2503.20783, listing 1).
    """
    if reduction == "token-mean":
        return torch.full_like(sequence_actions_T, 1.0 / num_action_tokens)
    if reduction == "sequence-mean-token-sum":
        return torch.full_like(sequence_actions_T, 1.0 / num_sequences)
    if reduction == "sequence-mean-constant-length":
        return torch.full_like(sequence_actions_T, 1.0 / (num_sequences * constant_length))
    return 1.0 / ((sequence_actions_T + LENGTH_EPSILON) * num_sequences)


def fixed_point_sum(x_T: torch.Tensor) -> torch.Tensor:
    """(sum in units of 2^-24, number of non-finite values left out of it), int64 [2].

    Exact, so any order and any sharding give the same bits once summed over ranks. Overflows only beyond 2^39 (5e11)
    nats in total. Non-finite values are counted, not raised: the ranks must decide together, after the reduction.
    """
    finite_T = torch.isfinite(x_T)
    scaled_T = torch.round(torch.where(finite_T, x_T, 0.0).double() * (1 << FIXED_POINT_BITS)).to(torch.int64)
    return torch.stack([scaled_T.sum(), (~finite_T).sum()])


def from_fixed_point(total: int) -> float:
    """The value in natural units; rounded once."""
    return total / (1 << FIXED_POINT_BITS)
