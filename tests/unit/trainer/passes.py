"""A forward-backward pass on one rank, or on ranks that are threads, without a model: the log-probs are given."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch

from stare_megatron.algo.comm import Comm, OneRank
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.stare import ScoredCandidates
from stare_megatron.config import AlgorithmConfig
from stare_megatron.trainer.scoring import Scored
from stare_megatron.trainer.step import ForwardBackwardResult, forward_backward
from stare_megatron.types import Control, Scores, TokenBatch

N = 60
CONTROL = Control(True, 1.5, 0.5, 0.2, 0.3)


def column(seed: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def tokens() -> dict[str, torch.Tensor]:
    """Of 12 sequences of 5 action tokens."""
    old_T = -column(1).abs()
    new_T = old_T + 0.1 * column(2)
    return {"old": old_T, "new": new_T, "entropy": column(3).abs(), "advantage": column(4), "sensitivity": column(5)}


def run_pass(
    method: str, settings: dict[str, Any], micro_batches: list[list[int]], comm: Comm | None = None
) -> ForwardBackwardResult:
    """`micro_batches`: tokens of each micro-batch of this rank, by index; may be empty."""
    comm, config = comm or OneRank(), AlgorithmConfig.model_validate({"method": method, **settings})
    own = torch.tensor([i for rows in micro_batches for i in rows], dtype=torch.int64)
    mine = {name: x[own] for name, x in tokens().items()}
    actions_T = torch.ones(len(own), dtype=torch.bool)
    batch = TokenBatch(
        token_ids_T=own,
        action_T=actions_T,
        rollout_logprob_T=mine["old"],
        version_T=torch.zeros_like(own),
        advantage_T=mine["advantage"],
        global_id_T=own,
        sequence_T=own // 5,
        cu_seqlens_N1=torch.tensor([0] * 12 + [len(own)]),
        global_sequence_N=torch.arange(12),
        num_action_tokens=N,
        num_sequences=12,
    )
    starts = torch.tensor([0, *(len(rows) for rows in micro_batches)]).cumsum(0).tolist()
    # A micro-batch without tokens goes through the output layer with one position and no target.
    sources = [torch.arange(a, b) if b > a else torch.tensor([-1]) for a, b in itertools.pairwise(starts)]

    def log_probs(source_R: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        kept_R = source_R.clamp(min=0)
        columns = (mine[name] if len(own) else torch.zeros(1) for name in ("new", "entropy", "sensitivity"))
        new_R, entropy_R, sensitivity_R = (x_T[kept_R] for x_T in columns)
        return new_R.requires_grad_(), entropy_R, sensitivity_R

    def run(rows: Any, consume: Any, *, train: bool) -> None:
        for row in rows:
            consume(row.source_R, row).backward()

    runner: Any = SimpleNamespace(
        run=run,
        head=SimpleNamespace(log_probs=log_probs),
        comm=comm,
        context_comm=OneRank(),
        place=torch.device("cpu"),
        is_last_stage=True,
        from_last_stage=lambda x: x,
        object_from_last_stage=lambda x: x,
    )
    rows = [SimpleNamespace(source_R=source_R, target_R=source_R) for source_R in sources]
    data: Any = SimpleNamespace(batch=batch, rows=rows, owned_T=actions_T, factor_T=torch.full((len(own),), 1 / N))
    known = (mine["old"], mine["entropy"], mine["sensitivity"])
    scored = Scored(Scores(*known), mine["old"])
    candidates = ScoredCandidates(-mine["old"], mine["advantage"], actions_T, own, *known[1:])
    weights = ALGORITHMS[method].weigh(candidates, CONTROL, config, comm)
    return forward_backward(runner, data, scored, weights, CONTROL, ALGORITHMS[method], config, temperature=1.0)
