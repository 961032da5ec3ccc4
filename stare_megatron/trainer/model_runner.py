"""One optimizer step's data on a rank, and how the rank runs its model over it: Megatron-Core's schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from stare_megatron.algo.comm import Comm
from stare_megatron.algo.reduce import token_factors
from stare_megatron.config import AlgorithmConfig
from stare_megatron.trainer.head import Head
from stare_megatron.trainer.replay import Replay
from stare_megatron.trainer.sequence import MicroBatch, SequenceLayout, micro_batches
from stare_megatron.trainer.spec import providers
from stare_megatron.types import TokenBatch, UpdateShare

Whatever = TypeVar("Whatever")


@dataclass(frozen=True, eq=False)
class RankBatch:
    """One optimizer step's data on a rank.

    `owned_T` bool: action tokens whose prediction this context-parallel rank makes; over the data- and
    context-parallel ranks each action token of the step is owned once. `factor_T` float32: weight of a token's loss in
    the plain sum (`algo.reduce`). `cost_imbalance`, `largest_tokens`: of the step over all ranks, as planned.
    """

    batch: TokenBatch
    rows: list[MicroBatch]
    owned_T: torch.Tensor
    factor_T: torch.Tensor
    cost_imbalance: float
    largest_tokens: int


def rank_batch(
    batch: TokenBatch,
    share: UpdateShare,
    layout: SequenceLayout,
    config: AlgorithmConfig,
    experts_TLK: torch.Tensor | None = None,
) -> RankBatch:
    rows = micro_batches(batch, share, layout, experts_TLK)
    owned_T = torch.zeros_like(batch.action_T)
    for row in rows:
        owned_T[row.source_P[row.source_P >= 0]] = True
    actions_N = torch.zeros(batch.global_sequence_N.shape[0], device=owned_T.device)
    actions_N.index_add_(0, batch.sequence_T, batch.action_T.float())
    factor_T = token_factors(
        config.reduction,
        actions_N[batch.sequence_T],
        num_action_tokens=batch.num_action_tokens,
        num_sequences=batch.num_sequences,
        constant_length=config.response_tokens,
    )
    return RankBatch(batch, rows, owned_T, factor_T, share.cost_imbalance, share.largest_tokens)


@dataclass(frozen=True, eq=False)
class Runner:
    """How this rank runs its model: chunks, the output layer (of the last stage), and who shares what.

    `comm`: the data- x context-parallel ranks; `context_comm`: the context-parallel ones. `pipeline`: the pipeline
    group, `last_stage`: global rank of its last stage. `replay`: of runs that route as the engines did.
    """

    chunks: Sequence[torch.nn.Module]
    head: Head
    comm: Comm
    context_comm: Comm
    pipeline: dist.ProcessGroup
    last_stage: int
    is_last_stage: bool
    place: torch.device
    replay: Replay | None

    def run(
        self, rows: Sequence[MicroBatch], consume: Callable[[torch.Tensor, MicroBatch], Any], *, train: bool
    ) -> None:
        """One pass over the micro-batches. `consume(hidden [R, H], row)` is called on the last stage, with the
        hidden states of `row.head_R`.

        Training, it returns the loss to go backward from (already divided by everything); otherwise nothing.
        """

        def forward(rows_left: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            row: MicroBatch = next(rows_left)
            if self.replay is not None:
                self.replay.set(chunk, row.experts_PLK)
            output = chunk(
                input_ids=row.token_ids_1P,
                position_ids=row.position_ids_1P,
                attention_mask=None,
                packed_seq_params=_packed(row),
                rows_R=row.head_R,
            )
            return output, functools.partial(_train if train else _score, row)

        def _train(row: MicroBatch, hidden_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            # The number of tokens is not used: see trainer.model.PolicyConfig.
            tokens = torch.zeros((), dtype=torch.int, device=hidden_RH.device)
            return consume(hidden_RH, row), tokens, {}

        def _score(row: MicroBatch, hidden_RH: torch.Tensor, non_loss_data: bool) -> None:
            consume(hidden_RH, row)

        schedule = get_forward_backward_func()
        with torch.set_grad_enabled(train):
            schedule(
                forward_step_func=forward,
                data_iterator=[iter(rows) for _ in self.chunks],
                model=list(self.chunks),
                num_microbatches=len(rows),
                seq_length=max(row.token_ids_1P.shape[1] for row in rows),
                micro_batch_size=1,
                forward_only=not train,
                collect_non_loss_data=not train,
            )
        if self.replay is not None:
            self.replay.forget()

    def from_last_stage(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as the last pipeline stage has it, on every stage; in place."""
        if dist.get_world_size(self.pipeline) > 1:
            dist.broadcast(x, src=self.last_stage, group=self.pipeline)
        return x

    def object_from_last_stage(self, x: Whatever) -> Whatever:
        """A small Python object as the last pipeline stage has it, on every stage."""
        box = [x]
        if dist.get_world_size(self.pipeline) > 1:
            dist.broadcast_object_list(box, src=self.last_stage, group=self.pipeline, device=self.place)
        return box[0]


def _packed(row: MicroBatch) -> PackedSeqParams:
    """As attention wants it. Padding counts as tokens of its sequence: it comes last, so causality hides it."""
    # Our attention and upstream's unfused rotary embedding read the bounds on the host, several times a layer: on a GPU
    # each time would wait for all the work before it.
    bounds = row.cu_seqlens_M1.to(row.token_ids_1P.device) if providers().transformer_engine else row.cu_seqlens_M1
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=row.max_seqlen,
        max_seqlen_kv=row.max_seqlen,
    )
