"""What every loss takes and returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class LossInputs:
    """The action tokens of a micro-batch, flat; any float dtype.

    `logprob_T`: of the policy being updated, requires grad; `old_logprob_T`: of the scoring pass; `advantage_T`;
    `weight_T`: from `Algorithm.weigh`; `correction_T`: rollout-correction factor, 1 where there is none;
    `sequence_T` int64: which sequence of this rank's `TokenBatch` a token belongs to.
    """

    logprob_T: torch.Tensor
    old_logprob_T: torch.Tensor
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    correction_T: torch.Tensor
    sequence_T: torch.Tensor


@dataclass(frozen=True, eq=False)
class TokenLoss:
    """`loss_T`: unreduced, differentiable. `ratio_T`: importance ratio; `clipped_T` bool: a bound was active."""

    loss_T: torch.Tensor
    ratio_T: torch.Tensor
    clipped_T: torch.Tensor
