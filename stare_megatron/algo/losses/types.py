"""What every loss takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from stare_megatron.algo.comm import Comm
from stare_megatron.types import Control


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences that a micro-batch's action tokens belong to.

    `index_T` int64 [T]: sequence of each token, below `count`. `context`: the ranks that share these sequences (context
    parallelism splits one; micro-batches never do), so that sums are over whole sequences at any layout.
    """

    index_T: torch.Tensor
    count: int
    context: Comm

    def sum(self, x_T: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the action tokens of each token's sequence, float64 [T], without gradient. A collective."""
        total_N = torch.zeros(self.count, dtype=torch.float64, device=x_T.device)
        total_N.index_add_(0, self.index_T, x_T.detach().double())
        return self.context.sum(total_N)[self.index_T]

    def mean(self, x_T: torch.Tensor) -> torch.Tensor:
        """`sum` divided by the sequence's action tokens, [T] in the dtype of `x_T`. Two collectives."""
        return (self.sum(x_T) / self.sum(torch.ones_like(x_T))).to(x_T.dtype)


@dataclass(frozen=True, eq=False)
class LossInputs:
    """The action tokens of a micro-batch, flat; any float dtype.

    `logprob_T`: of the policy being updated, requires grad; `old_logprob_T`: of the scoring pass; `entropy_T`: of the
    policy being updated, nats, differentiable where `Algorithm.entropy_gradient`; `advantage_T`; `weight_T` and
    `selected_T` bool: from `Algorithm.weigh`; `correction_T`: rollout-correction factor, 1 where there is none.
    """

    logprob_T: torch.Tensor
    old_logprob_T: torch.Tensor
    entropy_T: torch.Tensor
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    selected_T: torch.Tensor
    correction_T: torch.Tensor
    sequences: Sequences
    control: Control


@dataclass(frozen=True, eq=False)
class Reported:
    """A metric of an optimizer step: mean, sum, largest, or number of the true, of `x` in all its micro-batches.

    `x`: this micro-batch's values, any shape and dtype, perhaps none; no gradient is taken of them.

    Example:
        Reported(clipped_T)
    """

    x: torch.Tensor
    kind: Literal["mean", "sum", "count", "max"] = "mean"


@dataclass(frozen=True, eq=False)
class TokenLoss:
    """`loss_T`: unreduced, differentiable. `ratio_T`: importance ratio; `clipped_T` bool: a bound was active.

    `metrics`: what else to report, by a name in `metrics/catalogue.py`; the same names for every micro-batch.
    """

    loss_T: torch.Tensor
    ratio_T: torch.Tensor
    clipped_T: torch.Tensor
    metrics: Mapping[str, Reported] = field(default_factory=dict)
