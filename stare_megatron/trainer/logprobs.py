"""Log-prob, entropy and entropy sensitivity of vocab-parallel logits: one read, one collective, analytic backward.

Each tensor-parallel rank reduces its columns of a row to a partial (m, s, u, z, q, r) with d = (x - m) / tau: m the
maximum, s = sum e^d, u = sum d e^d, z the target's logit if it has it, else -inf, q = sum e^2d, r = sum d e^2d.
Partials merge associatively, so one all-gather over TP is all the communication:

    m* = max m_i      D_i = (m_i - m*) / tau      a_i = e^D_i
    s = sum a_i s_i   u = sum a_i (u_i + D_i s_i) z = max z_i
    q = sum a_i^2 q_i r = sum a_i^2 (r_i + D_i q_i)
    logp = (z - m*) / tau - log s                 H = log s - u / s
    B = (r - q u / s) / s^2                       S = p_y (H + logp) - B

S is the entropy sensitivity of the target y: a policy-gradient step of size eta on the row's logits with advantage A
changes the row's entropy by dH = -eta A S, B = sum p^2 (log p + H) >= 0 (to first order; eta is taken on x / tau).

The maximum is subtracted before dividing by tau, and the entropy's accumulator is shifted by it, which is what keeps
fp32 within 2e-6 of float64. Padded vocabulary columns are left out by a bound, never by a value. Rows are worked on in
chunks that fit the cache, so temporary memory does not grow with rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

CHUNK_ELEMENTS = 1 << 18  # logits worked on at a time: two fp32 scratch buffers of 1 MiB
FLOOR = -200.0  # e^-200 is 0 in fp32: the floor changes no sum, and keeps (-inf) * 0 from being computed
NO_TARGET = -1  # target of a row that carries no loss; the row is not read, its values are 0


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the vocabulary.

    `start`: global index of the first column; `valid`: columns before the padding, which may be 0. `group`: the
    tensor-parallel group; None means that all columns are here.
    """

    start: int
    valid: int
    group: dist.ProcessGroup | None


def vocab_shard(true_size: int, local_size: int, group: dist.ProcessGroup) -> VocabShard:
    """The shard of this rank when every rank of `group` holds `local_size` columns of a padded vocabulary."""
    start = dist.get_rank(group) * local_size
    valid = min(max(true_size - start, 0), local_size)
    return VocabShard(start, valid, group if dist.get_world_size(group) > 1 else None)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """fp32 [T], 0 where there is no target. `logprob_T`, `entropy_T`: natural log and nats at the given temperature;
    `sensitivity_T`: S of the target at that temperature, nats a unit of eta A; `raw_logprob_T`: at temperature 1."""

    logprob_T: torch.Tensor
    entropy_T: torch.Tensor
    sensitivity_T: torch.Tensor
    raw_logprob_T: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Merged:
    """Per row with a target, float64 [R]: maximum, log of the sum, u / s, the target's logit."""

    m_R: torch.Tensor
    log_s_R: torch.Tensor
    mean_d_R: torch.Tensor
    z_R: torch.Tensor

    def logprob(self, tau: float) -> torch.Tensor:
        return (self.z_R - self.m_R) / tau - self.log_s_R

    def entropy(self) -> torch.Tensor:
        return self.log_s_R - self.mean_d_R

    def rows(self, place: slice) -> _Merged:
        return _Merged(self.m_R[place], self.log_s_R[place], self.mean_d_R[place], self.z_R[place])


@torch.no_grad()
def token_scores(
    logits_TV: torch.Tensor, target_T: torch.Tensor, shard: VocabShard, *, temperature: float
) -> TokenScores:
    """Score without a graph. The value of row t is that of drawing `target_T[t]` from row t.

    Args:
        logits_TV: bf16 or fp32 [T, V_local], this rank's columns.
        target_T: int64 [T], global vocabulary ids; NO_TARGET for rows to skip.
    """
    rows_R = _rows(target_T)
    raw = temperature != 1.0
    partial_RC = _partials(logits_TV, target_T, rows_R, shard, temperature, sensitivity=True, raw=raw)
    return _scores(partial_RC, target_T, rows_R, shard, temperature)


def _scores(
    partial_RC: torch.Tensor, target_T: torch.Tensor, rows_R: torch.Tensor, shard: VocabShard, temperature: float
) -> TokenScores:
    """From this rank's partials of all rows, made with `sensitivity` and, unless the temperature is 1, `raw`."""
    all_IRC = _gather(partial_RC, shard)
    merged = _merge(all_IRC, temperature)
    logprob_R = merged.logprob(temperature)
    raw_R = logprob_R
    if temperature != 1.0:
        offset_IR = _floored(all_IRC[..., 0] - merged.m_R)
        raw_R = merged.z_R - merged.m_R - (offset_IR.exp() * all_IRC[..., -1]).sum(0).log()
    sensitivity_R = _sensitivity(all_IRC, merged, temperature)
    return TokenScores(*(_scatter(x, target_T, rows_R) for x in (logprob_R, merged.entropy(), sensitivity_R, raw_R)))


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
    def forward(ctx, logits_TV, target_T, shard: VocabShard, tau: float, entropy_gradient: bool):
        rows_R = _rows(target_T)
        partial_R4 = _partials(logits_TV, target_T, rows_R, shard, tau, sensitivity=False, raw=False)
        merged = _merge(_gather(partial_R4, shard), tau)
        ctx.logits_TV = logits_TV.detach()  # not save_for_backward: it is overwritten there on purpose
        ctx.target_T, ctx.rows_R, ctx.merged = target_T, rows_R, merged
        ctx.shard, ctx.tau, ctx.entropy_gradient = shard, tau, entropy_gradient
        logprob_T = _scatter(merged.logprob(tau), target_T, rows_R)
        entropy_T = _scatter(merged.entropy(), target_T, rows_R)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_T)
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx, *grads):  # (d loss / d logprob_T, d loss / d entropy_T)
        logits_TV = ctx.logits_TV
        if logits_TV is None:
            raise RuntimeError("log_probs: the backward overwrote the logits; it can run once only")
        ctx.logits_TV = None
        grad_entropy_T = grads[1] if ctx.entropy_gradient else None
        _backward_in_place(
            logits_TV, grads[0], grad_entropy_T, ctx.target_T, ctx.rows_R, ctx.merged, ctx.shard, ctx.tau
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

    `hidden_TH`, `weight_VH`: bf16 or fp32 [T, H] and [V_local, H].
    """
    partial_RC = _head_partials(hidden_TH, weight_VH, target_T, shard, temperature, chunk, scoring=True)
    return _scores(partial_RC, target_T, _rows(target_T), shard, temperature)


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
    parts = []
    for hidden_CH, target_C in zip(hidden_TH.split(chunk), target_T.split(chunk), strict=True):
        logits_CV = hidden_CH @ weight_VH.t()
        raw = scoring and tau != 1.0
        parts.append(_partials(logits_CV, target_C, _rows(target_C), shard, tau, sensitivity=scoring, raw=raw))
        del logits_CV  # before the next chunk's are made
    return torch.cat(parts)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, target_T, shard: VocabShard, tau: float, chunk: int, entropy_gradient: bool):
        partial_R4 = _head_partials(hidden_TH, weight_VH, target_T, shard, tau, chunk, scoring=False)
        ctx.save_for_backward(hidden_TH, weight_VH, target_T)
        ctx.merged = merged = _merge(_gather(partial_R4, shard), tau)
        ctx.shard, ctx.tau, ctx.chunk, ctx.entropy_gradient = shard, tau, chunk, entropy_gradient
        rows_R = _rows(target_T)
        entropy_T = _scatter(merged.entropy(), target_T, rows_R)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_T)
        return _scatter(merged.logprob(tau), target_T, rows_R), entropy_T

    @staticmethod
    def backward(ctx, *grads):  # (d loss / d logprob_T, d loss / d entropy_T)
        hidden_TH, weight_VH, target_T = ctx.saved_tensors
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        seen = 0
        for begin in range(0, target_T.shape[0], ctx.chunk):
            here = slice(begin, begin + ctx.chunk)
            rows_R = _rows(target_T[here])
            merged = ctx.merged.rows(slice(seen, seen + rows_R.shape[0]))
            seen += rows_R.shape[0]
            logits_CV = hidden_TH[here] @ weight_VH.t()
            grad_entropy_C = grads[1][here] if ctx.entropy_gradient else None
            _backward_in_place(
                logits_CV, grads[0][here], grad_entropy_C, target_T[here], rows_R, merged, ctx.shard, ctx.tau
            )
            torch.mm(logits_CV, weight_VH, out=grad_hidden_TH[here])
            grad_weight_VH += logits_CV.t() @ hidden_TH[here]
            del logits_CV
        if ctx.shard.group is not None:
            dist.all_reduce(grad_hidden_TH, group=ctx.shard.group)
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None


def _rows(target_T: torch.Tensor) -> torch.Tensor:
    return (target_T != NO_TARGET).nonzero()[:, 0]


def _scatter(x_R: torch.Tensor, target_T: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
    return torch.zeros(target_T.shape, dtype=torch.float32, device=x_R.device).index_copy(0, rows_R, x_R.float())


def _chunks(rows_R: torch.Tensor, columns: int) -> list[tuple[slice, torch.Tensor | slice]]:
    """(place among the rows with a target, rows of the logits) of each chunk; a run of rows is a slice, not a copy."""
    size = max(1, CHUNK_ELEMENTS // max(columns, 1))
    chunks = []
    bounds = rows_R.tolist()
    for begin in range(0, len(bounds), size):
        end = min(begin + size, len(bounds))
        run = bounds[end - 1] - bounds[begin] == end - 1 - begin
        chunks.append((slice(begin, end), slice(bounds[begin], bounds[end - 1] + 1) if run else rows_R[begin:end]))
    return chunks


def _floored(d: torch.Tensor) -> torch.Tensor:
    """Differences from the maximum, with -inf (and the -inf - -inf of an empty shard) at the floor."""
    return d.nan_to_num_(nan=FLOOR).clamp_(min=FLOOR)


def _partials(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    rows_R: torch.Tensor,
    shard: VocabShard,
    tau: float,
    *,
    sensitivity: bool,
    raw: bool,
) -> torch.Tensor:
    """This rank's (m, s, u, z) of each row with a target, then with `sensitivity` (q, r), then with `raw` s at
    temperature 1: fp32 [R, 4 to 7]."""
    partial_R = logits_TV.new_zeros((rows_R.shape[0], 4 + 2 * sensitivity + raw), dtype=torch.float32)
    partial_R[:, 0] = partial_R[:, 3] = -torch.inf
    if shard.valid == 0:
        return partial_R
    local_R = target_T[rows_R] - shard.start
    here_R = (local_R >= 0) & (local_R < shard.valid)
    for place, rows in _chunks(rows_R, shard.valid):
        x_CV = logits_TV[rows, : shard.valid].float()
        m_C = x_CV.amax(1)
        z_C = x_CV.gather(1, local_R[place].clamp(0, shard.valid - 1)[:, None])[:, 0]
        shift_C1 = torch.where(m_C == -torch.inf, 0.0, m_C)[:, None]
        d_CV = (x_CV - shift_C1).clamp_(min=FLOOR * max(tau, 1.0))
        if raw:
            partial_R[place, -1] = d_CV.exp().sum(1)
        if tau != 1.0:
            d_CV.div_(tau).clamp_(min=FLOOR)
        e_CV = d_CV.exp()
        partial_R[place, 0] = m_C
        partial_R[place, 1] = e_CV.sum(1)
        partial_R[place, 2] = d_CV.mul_(e_CV).sum(1)
        if sensitivity:
            partial_R[place, 5] = d_CV.mul_(e_CV).sum(1)
            partial_R[place, 4] = e_CV.square_().sum(1)
        partial_R[place, 3] = torch.where(here_R[place], z_C, -torch.inf)
    return partial_R


def _gather(partial_R: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Partials of all tensor-parallel ranks, float64 [I, R, 4 to 7]: the one collective."""
    if shard.group is None:
        return partial_R[None].double()
    size = dist.get_world_size(shard.group)
    all_IR = partial_R.new_empty((size * partial_R.shape[0], partial_R.shape[1]))
    dist.all_gather_into_tensor(all_IR, partial_R, group=shard.group)
    return all_IR.view(size, *partial_R.shape).double()


def _merge(all_IRC: torch.Tensor, tau: float) -> _Merged:
    m_IR, s_IR, u_IR, z_IR = all_IRC[..., :4].unbind(-1)
    m_R = m_IR.amax(0)
    offset_IR = _floored((m_IR - m_R) / tau)
    a_IR = offset_IR.exp()
    s_R = (a_IR * s_IR).sum(0)
    u_R = (a_IR * (u_IR + offset_IR * s_IR)).sum(0)
    return _Merged(m_R, s_R.log(), u_R / s_R, z_IR.amax(0))


def _sensitivity(all_IRC: torch.Tensor, merged: _Merged, tau: float) -> torch.Tensor:
    """S of each row's target, float64 [R], from partials with (q, r)."""
    m_IR, q_IR, r_IR = all_IRC[..., (0, 4, 5)].unbind(-1)
    offset_IR = _floored((m_IR - merged.m_R) / tau)
    a2_IR = (2 * offset_IR).exp()
    q_R = (a2_IR * q_IR).sum(0)
    r_R = (a2_IR * (r_IR + offset_IR * q_IR)).sum(0)
    b_R = (r_R - q_R * merged.mean_d_R) * (-2 * merged.log_s_R).exp()
    logprob_R = merged.logprob(tau).clamp(min=FLOOR)  # p_y s_y is 0 for a target that cannot be drawn
    return logprob_R.exp() * (merged.entropy() + logprob_R) - b_R


def _backward_in_place(
    logits_TV: torch.Tensor,
    grad_logprob_T: torch.Tensor,
    grad_entropy_T: torch.Tensor | None,
    target_T: torch.Tensor,
    rows_R: torch.Tensor,
    merged: _Merged,
    shard: VocabShard,
    tau: float,
) -> None:
    """dL/dx_v = (g_lp (1[v = y] - p_v) - g_H p_v (log p_v + H)) / tau, written over the logits."""
    local_R = target_T[rows_R] - shard.start
    here_R = (local_R >= 0) & (local_R < shard.valid)
    g_R1 = (grad_logprob_T[rows_R].float() / tau)[:, None]
    m_R1, log_s_R1 = merged.m_R.float()[:, None], merged.log_s_R.float()[:, None]
    for place, rows in _chunks(rows_R, shard.valid):
        x_CV = logits_TV[rows, : shard.valid].float()
        log_p_CV = (x_CV - m_R1[place]).div_(tau).sub_(log_s_R1[place]).clamp_(min=FLOOR)
        grad_CV = log_p_CV.exp()
        if grad_entropy_T is None:
            grad_CV.mul_(-g_R1[place])
        else:
            g_entropy_C1 = (grad_entropy_T[rows_R[place]].float() / tau)[:, None]
            entropy_C1 = merged.entropy().float()[place, None]
            grad_CV.mul_(log_p_CV.add_(entropy_C1).mul_(-g_entropy_C1).sub_(g_R1[place]))
        bonus_C1 = torch.where(here_R[place, None], g_R1[place], 0.0)
        grad_CV.scatter_add_(1, local_R[place].clamp(0, max(shard.valid - 1, 0))[:, None], bonus_C1)
        logits_TV[rows, : shard.valid] = grad_CV.to(logits_TV.dtype)
    logits_TV[:, shard.valid :] = 0.0
    logits_TV[target_T == NO_TARGET] = 0.0
