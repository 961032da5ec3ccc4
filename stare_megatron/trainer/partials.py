"""What a rank knows of a row after reading its columns, and how such partials become log-prob, entropy and sensitivity.

Each tensor-parallel rank reduces its columns of a row to a partial (m, s, u, z, q, r) with d = (x - m) / tau: m the
maximum, s = sum e^d, u = sum d e^d, z the target's logit if it has it, else -inf, q = sum e^2d, r = sum d e^2d.
Partials merge associatively, with (-inf, 0, 0, -inf, 0, 0) as the identity:

    m* = max m_i      D_i = (m_i - m*) / tau      a_i = e^D_i
    s = sum a_i s_i   u = sum a_i (u_i + D_i s_i) z = max z_i
    q = sum a_i^2 q_i r = sum a_i^2 (r_i + D_i q_i)
    logp = (z - m*) / tau - log s                 H = log s - u / s
    B = (r - q u / s) / s^2                       S = p_y (H + logp) - B

S is the entropy sensitivity of the target y: a policy-gradient step of size eta on the row's logits with advantage A
changes the row's entropy by dH = -eta A S, B = sum p^2 (log p + H) >= 0 (to first order; eta is taken on x / tau).

A tensor of partials is fp32 [K, T], K = 4 to 7: m, s, u, z, then q and r where the sensitivity is wanted, then s at
temperature 1 where that is wanted. The columns are read by `logprobs_torch` or `logprobs_triton`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

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


def components(*, sensitivity: bool, raw: bool) -> int:
    """K, the rows of a tensor of partials."""
    return 4 + 2 * sensitivity + raw


@dataclass(frozen=True, eq=False)
class TokenScores:
    """fp32 [T], 0 where there is no target. `logprob_T`, `entropy_T`: natural log and nats at the given temperature;
    `sensitivity_T`: S of the target at that temperature, nats a unit of eta A; `raw_logprob_T`: at temperature 1."""

    logprob_T: torch.Tensor
    entropy_T: torch.Tensor
    sensitivity_T: torch.Tensor
    raw_logprob_T: torch.Tensor


@dataclass(frozen=True, eq=False)
class Merged:
    """Of each row, float64 [T]: maximum, log of the sum, u / s, the target's logit. NaN where there is no target."""

    m_T: torch.Tensor
    log_s_T: torch.Tensor
    mean_d_T: torch.Tensor
    z_T: torch.Tensor

    def logprob(self, tau: float) -> torch.Tensor:
        return (self.z_T - self.m_T) / tau - self.log_s_T

    def entropy(self) -> torch.Tensor:
        return self.log_s_T - self.mean_d_T

    def rows(self, place: slice) -> Merged:
        return Merged(self.m_T[place], self.log_s_T[place], self.mean_d_T[place], self.z_T[place])


def gather(partial_KT: torch.Tensor, shard: VocabShard, tau: float) -> torch.Tensor:
    """Partials of the whole rows, float64 [K, T], on every tensor-parallel rank: the one collective."""
    if shard.group is None:
        return partial_KT.double()
    size = dist.get_world_size(shard.group)
    all_IKT = partial_KT.new_empty((size * partial_KT.shape[0], partial_KT.shape[1]))
    dist.all_gather_into_tensor(all_IKT, partial_KT.contiguous(), group=shard.group)
    return combine(all_IKT.view(size, *partial_KT.shape), tau)


def combine(all_IKT: torch.Tensor, tau: float) -> torch.Tensor:
    """Partials of I disjoint sets of columns [I, K, T] as those of their union, float64 [K, T]."""
    m_IT, s_IT, u_IT, z_IT, *more = all_IKT.double().unbind(1)
    m_T = m_IT.amax(0)
    offset_IT = _floored((m_IT - m_T) / tau)
    a_IT = offset_IT.exp()
    merged = [m_T, (a_IT * s_IT).sum(0), (a_IT * (u_IT + offset_IT * s_IT)).sum(0), z_IT.amax(0)]
    if len(more) >= 2:
        a2_IT, q_IT, r_IT = a_IT.square(), *more[:2]
        merged += [(a2_IT * q_IT).sum(0), (a2_IT * (r_IT + offset_IT * q_IT)).sum(0)]
    if len(more) % 2:
        merged.append((_floored(m_IT - m_T).exp() * more[-1]).sum(0))
    return torch.stack(merged)


def merged(partial_KT: torch.Tensor) -> Merged:
    """Of the partials of whole rows, float64."""
    m_T, s_T, u_T, z_T = partial_KT[:4]
    return Merged(m_T, s_T.log(), u_T / s_T, z_T)


def token_values(partial_KT: torch.Tensor, target_T: torch.Tensor, tau: float) -> TokenScores:
    """From the partials of whole rows, float64, made with `sensitivity` and, unless the temperature is 1, `raw`."""
    row = merged(partial_KT)
    logprob_T = row.logprob(tau)
    raw_T = logprob_T if tau == 1.0 else row.z_T - row.m_T - partial_KT[-1].log()
    values = (logprob_T, row.entropy(), sensitivity(partial_KT, row, tau), raw_T)
    return TokenScores(*(at_targets(x_T, target_T) for x_T in values))


def sensitivity(partial_KT: torch.Tensor, row: Merged, tau: float) -> torch.Tensor:
    """S of each row's target, float64 [T], from partials of whole rows with (q, r)."""
    q_T, r_T = partial_KT[4:6]
    b_T = (r_T - q_T * row.mean_d_T) * (-2 * row.log_s_T).exp()
    logprob_T = row.logprob(tau).clamp(min=FLOOR)  # p_y s_y is 0 for a target that cannot be drawn
    return logprob_T.exp() * (row.entropy() + logprob_T) - b_T


def at_targets(x_T: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """fp32, 0 in rows without a target, whatever is there."""
    return torch.where(target_T != NO_TARGET, x_T, 0.0).float()


def _floored(d: torch.Tensor) -> torch.Tensor:
    """Differences from the maximum, with -inf (and the -inf - -inf of an empty shard) at the floor."""
    return d.nan_to_num_(nan=FLOOR).clamp_(min=FLOOR)
