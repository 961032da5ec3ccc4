"""Columns of vocab-parallel logits to partials, and the gradient written over the logits, in plain PyTorch.

For CPUs, and where `logprobs_triton` does not serve. Rows are worked on in chunks that fit the cache, so temporary
memory does not grow with rows. On a GPU it makes the host wait (it lists the rows that have a target).
"""

from __future__ import annotations

import torch

from stare_megatron.trainer.partials import FLOOR, NO_TARGET, Merged, VocabShard, components

CHUNK_ELEMENTS = 1 << 18  # logits worked on at a time: two fp32 scratch buffers of 1 MiB


def partials(
    logits_TV: torch.Tensor, target_T: torch.Tensor, shard: VocabShard, tau: float, *, sensitivity: bool, raw: bool
) -> torch.Tensor:
    """This rank's partials of its columns, fp32 [K, T]; the identity in rows without a target.

    The maximum is subtracted before dividing by tau, and the entropy's accumulator is shifted by it, which is what
    keeps fp32 within 2e-6 of float64. Padded columns are left out by a bound, never by a value.

    Args:
        logits_TV: bf16, fp16 or fp32 [T, V_local].
        target_T: int64 [T], global vocabulary ids; NO_TARGET for rows to skip.
    """
    partial_KT = logits_TV.new_zeros((components(sensitivity=sensitivity, raw=raw), len(target_T)), dtype=torch.float32)
    partial_KT[0] = partial_KT[3] = -torch.inf
    if shard.valid == 0:
        return partial_KT
    local_T = target_T - shard.start
    here_T = (local_T >= 0) & (local_T < shard.valid)
    local_T = local_T.clamp(0, shard.valid - 1)
    for rows in _chunks(target_T, shard.valid):
        x_CV = logits_TV[rows, : shard.valid].float()
        m_C = x_CV.amax(1)
        z_C = x_CV.gather(1, local_T[rows, None])[:, 0]
        shift_C1 = torch.where(m_C == -torch.inf, 0.0, m_C)[:, None]
        d_CV = (x_CV - shift_C1).clamp_(min=FLOOR * max(tau, 1.0))
        if raw:
            partial_KT[-1, rows] = d_CV.exp().sum(1)
        if tau != 1.0:
            d_CV.div_(tau).clamp_(min=FLOOR)
        e_CV = d_CV.exp()
        partial_KT[0, rows] = m_C
        partial_KT[1, rows] = e_CV.sum(1)
        partial_KT[2, rows] = d_CV.mul_(e_CV).sum(1)
        if sensitivity:
            partial_KT[5, rows] = d_CV.mul_(e_CV).sum(1)
            partial_KT[4, rows] = e_CV.square_().sum(1)
        partial_KT[3, rows] = torch.where(here_T[rows], z_C, -torch.inf)
    return partial_KT


def backward_in_place(
    logits_TV: torch.Tensor,
    grad_logprob_T: torch.Tensor,
    grad_entropy_T: torch.Tensor | None,
    target_T: torch.Tensor,
    row: Merged,
    shard: VocabShard,
    tau: float,
) -> None:
    """dL/dx_v = (g_lp (1[v = y] - p_v) - g_H p_v (log p_v + H)) / tau, written over the logits.

    0 in padded columns and in rows without a target. `grad_entropy_T` None: g_H = 0.
    """
    local_T = target_T - shard.start
    here_T = (local_T >= 0) & (local_T < shard.valid)
    local_T = local_T.clamp(0, max(shard.valid - 1, 0))
    g_T = grad_logprob_T.float() / tau
    m_T, log_s_T, entropy_T = row.m_T.float(), row.log_s_T.float(), row.entropy().float()
    for rows in _chunks(target_T, shard.valid):
        x_CV = logits_TV[rows, : shard.valid].float()
        log_p_CV = (x_CV - m_T[rows, None]).div_(tau).sub_(log_s_T[rows, None]).clamp_(min=FLOOR)
        grad_CV = log_p_CV.exp()
        if grad_entropy_T is None:
            grad_CV.mul_(-g_T[rows, None])
        else:
            g_entropy_C1 = (grad_entropy_T[rows].float() / tau)[:, None]
            grad_CV.mul_(log_p_CV.add_(entropy_T[rows, None]).mul_(-g_entropy_C1).sub_(g_T[rows, None]))
        if shard.valid:
            bonus_C1 = torch.where(here_T[rows], g_T[rows], 0.0)[:, None]
            grad_CV.scatter_add_(1, local_T[rows, None], bonus_C1)
        logits_TV[rows, : shard.valid] = grad_CV.to(logits_TV.dtype)
    logits_TV[:, shard.valid :] = 0.0
    logits_TV[target_T == NO_TARGET] = 0.0


def _chunks(target_T: torch.Tensor, columns: int) -> list[torch.Tensor | slice]:
    """Rows that have a target, some at a time; a run of neighbours is a slice, which is no copy of the logits."""
    size = max(1, CHUNK_ELEMENTS // max(columns, 1))
    chunks: list[torch.Tensor | slice] = []
    for rows_C in (target_T != NO_TARGET).nonzero()[:, 0].split(size):
        if not len(rows_C):
            continue
        first, last = int(rows_C[0]), int(rows_C[-1])
        chunks.append(slice(first, last + 1) if last - first == len(rows_C) - 1 else rows_C)
    return chunks
