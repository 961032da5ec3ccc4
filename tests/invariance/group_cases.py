"""What the tests of single collectives run on gloo ranks: torch only, so that a rank starts in two seconds."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from launch import Rank

from stare_megatron.algo.comm import GroupComm, comm
from stare_megatron.algo.reduce import fixed_point_sum
from stare_megatron.algo.selection import NEGATIVE, NEITHER, POSITIVE, select_top
from stare_megatron.trainer.logprobs import log_probs, token_scores
from stare_megatron.trainer.partials import NO_TARGET, vocab_shard


class CountingShards(GroupComm):
    """Counts collectives and the bytes given to them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.calls = self.bytes = 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.bytes += x.nbytes
        return super().sum(x)


def _join(rank: Rank) -> dist.ProcessGroup:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{rank.master_addr}:{rank.master_port}",
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=datetime.timedelta(seconds=300),
    )
    group = dist.group.WORLD
    assert group is not None
    return group


def tokens(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(surprisal, subset, global id) of a whole batch."""
    g = torch.Generator().manual_seed(len(kind))
    surprisal = -torch.log(torch.rand(n, generator=g))
    subset = torch.randint(0, 3, (n,), generator=g)
    if kind == "ties":
        surprisal = (surprisal * 2).round() / 2
    elif kind == "equal":
        surprisal = torch.full((n,), 0.25)
    elif kind == "nan":
        surprisal[::7] = torch.nan
    elif kind == "infinite":
        surprisal[::3], surprisal[1::5] = torch.inf, -torch.inf
    elif kind == "zeros":
        surprisal = torch.where(surprisal > 1, 0.0, -0.0)
    elif kind == "empty subset":
        subset = torch.where(subset == POSITIVE, NEITHER, subset)
    elif kind == "one token":
        subset = torch.where(torch.arange(n) == n // 2, NEGATIVE, NEITHER)
    return surprisal, subset, torch.randperm(n, generator=g)


def selection(rank: Rank, *, kinds: list[str], n: int, fraction: float) -> dict[str, dict[str, Any]]:
    """Of each kind of batch: the ids chosen on this rank, the counts, the traffic; and the entropy's sum."""
    group = _join(rank)
    seen = {}
    for kind in kinds:
        surprisal, subset, ids = tokens(kind, n)
        bounds = [n * r * r // rank.world_size**2 for r in range(rank.world_size + 1)]  # uneven shards
        own = slice(bounds[rank.rank], bounds[rank.rank + 1])
        counting = CountingShards(group)
        got = select_top(surprisal[own], subset[own], ids[own], fraction, counting)
        seen[kind] = {
            "ids": ids[own][got.selected_T],
            "counts": (got.count_S.tolist(), got.selected_S.tolist(), int(got.nan)),
            "traffic": (counting.calls, counting.bytes),
            "entropy": comm(group).sum(fixed_point_sum(surprisal[own])).tolist(),
        }
    dist.destroy_process_group()
    return seen


def logprobs(
    rank: Rank, *, vocab: int, rows: int, temperature: float, offsets: list[float]
) -> dict[float, dict[str, torch.Tensor]]:
    """Of logits at each offset: how far scores and gradient of vocab-parallel logits are from float64's. Half of the
    vocabulary is masked to -inf in every second row; the padding is hostile; one row has no target."""
    group = _join(rank)
    errors = {}
    for offset in offsets:
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, vocab, generator=g) * torch.linspace(0.5, 6, rows)[:, None] + offset
        target = torch.randint(0, vocab, (rows,), generator=g)
        mask = torch.rand(logits.shape, generator=g) < 0.5
        mask[1::2] = False
        logits[mask.scatter(1, target[:, None], False)] = -torch.inf
        target[rows // 2] = NO_TARGET
        errors[offset] = _logprob_errors(rank, logits, target, temperature, group)
    dist.destroy_process_group()
    return errors


def _logprob_errors(
    rank: Rank, logits: torch.Tensor, target: torch.Tensor, temperature: float, group: dist.ProcessGroup
) -> dict[str, torch.Tensor]:
    rows, vocab = logits.shape
    kept = target != NO_TARGET
    width = -(-vocab // (128 * rank.world_size)) * 128
    padded = torch.full((rows, width * rank.world_size), 1e5)
    padded[:, :vocab] = logits
    columns = slice(rank.rank * width, (rank.rank + 1) * width)
    mine = padded[:, columns].contiguous()
    shard = vocab_shard(vocab, width, group)
    scores = token_scores(mine, target, shard, temperature=temperature)
    leaf = mine.clone().requires_grad_()
    logprob, entropy = log_probs(leaf * 1.0, target, shard, temperature=temperature, entropy_gradient=True)
    (logprob - 0.5 * entropy).sum().backward()
    assert leaf.grad is not None

    exact = logits.double().requires_grad_()
    logp = torch.log_softmax(exact / temperature, -1)
    p, finite = logp.exp(), logp.clamp(min=-1e30)
    at = target.clamp(0)[:, None]
    want, want_entropy = logp.gather(1, at)[:, 0], -torch.where(p > 0, p * finite, 0.0).sum(-1)
    (kept * (want - 0.5 * want_entropy)).sum().backward()
    assert exact.grad is not None
    padded_grad = torch.zeros(padded.shape, dtype=torch.float64)
    padded_grad[:, :vocab] = exact.grad.nan_to_num(0.0)
    slope = p.detach() * (finite.detach() + want_entropy.detach()[:, None])
    want_sensitivity = slope.gather(1, at)[:, 0] - (p.detach() * slope).sum(-1)
    return {
        "logprob": (scores.logprob_T - kept * want.detach()).abs().max(),
        "entropy": (scores.entropy_T - kept * want_entropy.detach()).abs().max(),
        "sensitivity": (scores.sensitivity_T - kept * want_sensitivity).abs().max(),
        "same": (scores.logprob_T - logprob.detach()).abs().max(),
        "gradient": (leaf.grad - padded_grad[:, columns]).abs().max(),
    }
