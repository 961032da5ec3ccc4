"""Log-prob, entropy and entropy sensitivity of vocab-parallel logits: one read, one collective, analytic backward.

What is computed, and how the tensor-parallel ranks' parts merge: `trainer.partials`. The columns are read and the
gradient is written by `trainer.logprobs_triton` where `device.triton_serves`, else by `trainer.logprobs_torch`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

from stare_megatron.host import device
from stare_megatron.trainer import logprobs_torch
from stare_megatron.trainer.partials import (
    Merged,
    TokenScores,
    VocabShard,
    at_targets,
    gather,
    merged,
    token_values,
)


class Kernels(Protocol):
    """The two passes over the logits; a module is one implementation."""

    def partials(
        self,
        logits_TV: torch.Tensor,
        target_T: torch.Tensor,
        shard: VocabShard,
        tau: float,
        *,
        sensitivity: bool,
        raw: bool,
    ) -> torch.Tensor:
        """See `logprobs_torch.partials`."""
        ...

    def backward_in_place(
        self,
        logits_TV: torch.Tensor,
        grad_logprob_T: torch.Tensor,
        grad_entropy_T: torch.Tensor | None,
        target_T: torch.Tensor,
        row: Merged,
        shard: VocabShard,
        tau: float,
    ) -> None:
        """See `logprobs_torch.backward_in_place`."""
        ...


def kernels(logits_TV: torch.Tensor) -> Kernels:
    """The implementation that works on `logits_TV`."""
    if device.triton_serves(logits_TV) and logits_TV.stride(1) == 1:
        from stare_megatron.trainer import logprobs_triton  # where it does not serve, triton need not be installed

        return logprobs_triton
    return logprobs_torch


@torch.no_grad()
def token_scores(
    logits_TV: torch.Tensor, target_T: torch.Tensor, shard: VocabShard, *, temperature: float
) -> TokenScores:
    """Score without a graph. The value of row t is that of drawing `target_T[t]` from row t.

    Args:
        logits_TV: bf16, fp16 or fp32 [T, V_local], this rank's columns.
        target_T: int64 [T], global vocabulary ids; NO_TARGET for rows to skip.
    """
    raw = temperature != 1.0
    partial_KT = kernels(logits_TV).partials(logits_TV, target_T, shard, temperature, sensitivity=True, raw=raw)
    return token_values(gather(partial_KT, shard, temperature), target_T, temperature)


def log_probs(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy, fp32 [T] each, as `token_scores`, differentiable in `logits_TV`.

    The backward OVERWRITES `logits_TV` with its gradient and hands it on, so the largest tensor of the step exists
    once: nothing else may read the logits afterwards, and a second backward is refused. The gradient is 0 in padded
    columns and in rows without a target. Without `entropy_gradient` the entropy is a plain value.
    """
    logprob_T, entropy_T = _LogProbs.apply(logits_TV, target_T, shard, temperature, entropy_gradient)
    return logprob_T, entropy_T


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, target_T: torch.Tensor, shard: VocabShard, tau: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        partial_KT = kernels(logits_TV).partials(logits_TV, target_T, shard, tau, sensitivity=False, raw=False)
        row = merged(gather(partial_KT, shard, tau))
        ctx.logits_TV = logits_TV.detach()  # not save_for_backward: it is overwritten there on purpose
        ctx.target_T, ctx.row, ctx.shard, ctx.tau, ctx.entropy_gradient = target_T, row, shard, tau, entropy_gradient
        entropy_T = at_targets(row.entropy(), target_T)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_T)
        return at_targets(row.logprob(tau), target_T), entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`grads`: d loss / d logprob_T, d loss / d entropy_T."""
        logits_TV = ctx.logits_TV
        if logits_TV is None:
            raise RuntimeError("log_probs: the backward overwrote the logits; it can run once only")
        ctx.logits_TV = None
        grad_entropy_T = grads[1] if ctx.entropy_gradient else None
        kernels(logits_TV).backward_in_place(
            logits_TV, grads[0], grad_entropy_T, ctx.target_T, ctx.row, ctx.shard, ctx.tau
        )
        return logits_TV, None, None, None, None


@torch.no_grad()
def head_token_scores(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    chunk: int,
) -> TokenScores:
    """`token_scores` of the logits hidden_TH @ weight_VH^T, of which at most `chunk` rows exist at a time.

    `hidden_TH`, `weight_VH`: bf16, fp16 or fp32 [T, H] and [V_local, H].
    """
    partial_KT = _head_partials(hidden_TH, weight_VH, target_T, shard, temperature, chunk, scoring=True)
    return token_values(gather(partial_KT, shard, temperature), target_T, temperature)


def head_log_probs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    chunk: int,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_probs` of the logits hidden_TH @ weight_VH^T, differentiable in both factors.

    At most `chunk` rows of logits exist at a time; the backward makes them once more, without another collective for
    them. It sums the gradient of `hidden_TH` over TP in one all-reduce, and that of `weight_VH` over chunks in fp32.
    """
    logprob_T, entropy_T = _HeadLogProbs.apply(
        hidden_TH, weight_VH, target_T, shard, temperature, chunk, entropy_gradient
    )
    return logprob_T, entropy_T


def _head_partials(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    shard: VocabShard,
    tau: float,
    chunk: int,
    *,
    scoring: bool,
) -> torch.Tensor:
    """fp32 [K, T], of all chunks."""
    parts = []
    for hidden_CH, target_C in zip(hidden_TH.split(chunk), target_T.split(chunk), strict=True):
        logits_CV = hidden_CH @ weight_VH.t()
        raw = scoring and tau != 1.0
        parts.append(kernels(logits_CV).partials(logits_CV, target_C, shard, tau, sensitivity=scoring, raw=raw))
        del logits_CV  # before the next chunk's are made
    return torch.cat(parts, 1)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_T: torch.Tensor,
        shard: VocabShard,
        tau: float,
        chunk: int,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        partial_KT = _head_partials(hidden_TH, weight_VH, target_T, shard, tau, chunk, scoring=False)
        ctx.save_for_backward(hidden_TH, weight_VH, target_T)
        ctx.row = row = merged(gather(partial_KT, shard, tau))
        ctx.shard, ctx.tau, ctx.chunk, ctx.entropy_gradient = shard, tau, chunk, entropy_gradient
        entropy_T = at_targets(row.entropy(), target_T)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_T)
        return at_targets(row.logprob(tau), target_T), entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`grads`: d loss / d logprob_T, d loss / d entropy_T."""
        hidden_TH, weight_VH, target_T = ctx.saved_tensors
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for begin in range(0, target_T.shape[0], ctx.chunk):
            here = slice(begin, begin + ctx.chunk)
            logits_CV = hidden_TH[here] @ weight_VH.t()
            grad_entropy_C = grads[1][here] if ctx.entropy_gradient else None
            kernels(logits_CV).backward_in_place(
                logits_CV, grads[0][here], grad_entropy_C, target_T[here], ctx.row.rows(here), ctx.shard, ctx.tau
            )
            torch.mm(logits_CV, weight_VH, out=grad_hidden_TH[here])
            grad_weight_VH += logits_CV.t() @ hidden_TH[here]
            del logits_CV
        if ctx.shard.group is not None:
            dist.all_reduce(grad_hidden_TH, group=ctx.shard.group)
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None
