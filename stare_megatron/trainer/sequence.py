"""From trajectories to packed micro-batches: the only place where padding exists.

`Groups + UpdateShare -> TokenBatch -> MicroBatch...`. A micro-batch is one packed row (THD): sequences end to end, no
padding between them beyond what context parallelism (a multiple of 2 CP each) and sequence parallelism (a multiple of
TP in all) ask for. Padding follows a sequence's own tokens, so causal attention hides it from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.registry import Algorithm
from stare_megatron.config import AlgorithmConfig
from stare_megatron.trainer.partials import NO_TARGET
from stare_megatron.types import Group, TokenBatch, UpdateShare

PADDING_TOKEN = 0


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One packed row, P tokens on this context-parallel rank; all tensors but `cu_seqlens_M1` on the rank's device.

    `token_ids_1P`, `position_ids_1P` int64 [1, P]. `target_P` int64: the token that position p is asked to predict,
    NO_TARGET where it carries no loss. `source_P` int64: index of that target in the `TokenBatch`, -1 likewise.
    `head_R` int64: positions that go through the output layer, those with a target; position 0 if there is none, so
    that no rank's graph or collective is empty. `target_R`, `source_R`: the two above at those positions.
    `experts_PLK` int16 [P, layers, top_k]: the engine's experts in this rank's layers; None: the routers' own.
    `cu_seqlens_M1` int32 [M + 1], on the CPU: bounds of the M sequences, with padding, over all context-parallel ranks;
    `max_seqlen`: the longest of them.
    """

    token_ids_1P: torch.Tensor
    position_ids_1P: torch.Tensor
    target_P: torch.Tensor
    source_P: torch.Tensor
    head_R: torch.Tensor
    target_R: torch.Tensor
    source_R: torch.Tensor
    cu_seqlens_M1: torch.Tensor
    max_seqlen: int
    experts_PLK: torch.Tensor | None


@dataclass(frozen=True)
class SequenceLayout:
    """What decides padding and slicing: sizes of tensor (when sequence-parallel, else 1) and context parallelism.
    `block`: a rank's tokens come in multiples of it."""

    sequence_parallel: int
    context_parallel: int
    context_rank: int
    block: int = 1


def token_batch(
    groups: Sequence[Group], share: UpdateShare, algorithm: Algorithm, config: AlgorithmConfig, device: torch.device
) -> TokenBatch:
    """This rank's sequences of one optimizer step. Advantages come from the rewards of each whole group but its FAILED
    trajectories, which say nothing about the policy.

    An empty share gives a batch without sequences.
    """
    columns: dict[str, list[np.ndarray]] = {k: [] for k in ("token", "action", "logprob", "version", "advantage", "id")}
    lengths: list[int] = []
    first_ids: list[int] = []
    for assignment in share.assignments:
        group = groups[assignment.group]
        counted = [i for i, trajectory in enumerate(group.trajectories) if trajectory.status.is_trainable]
        outcomes = [Outcome(group.scores[i].reward, group.trajectories[i].num_action_tokens) for i in counted]
        values = algorithm.advantage(outcomes, config)
        advantages = dict(zip(counted, values, strict=True))
        for sample, first in zip(assignment.samples, assignment.first_token, strict=True):
            trajectory = group.trajectories[sample]
            action = trajectory.action_mask()
            # The first token is predicted by nothing, so it can never carry loss; a prompt span makes it no action.
            columns["token"].append(trajectory.token_ids())
            columns["action"].append(action)
            columns["logprob"].append(trajectory.rollout_logprobs())
            columns["version"].append(trajectory.versions())
            columns["advantage"].append(np.where(action, np.float32(advantages[sample]), np.float32(0)))
            columns["id"].append(np.arange(first, first + len(action)))
            lengths.append(len(action))
            first_ids.append(first)

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        parts = columns[name]
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0)).to(device, dtype)

    length_N = torch.tensor(lengths, dtype=torch.int64)
    cu_N1 = torch.cat([torch.zeros(1, dtype=torch.int64), length_N.cumsum(0)])
    return TokenBatch(
        token_ids_T=column("token", torch.int64),
        action_T=column("action", torch.bool),
        rollout_logprob_T=column("logprob", torch.float32),
        version_T=column("version", torch.int64),
        advantage_T=column("advantage", torch.float32),
        global_id_T=column("id", torch.int64),
        sequence_T=torch.arange(len(lengths)).repeat_interleave(length_N).to(device),
        cu_seqlens_N1=cu_N1.to(torch.int32),
        global_sequence_N=torch.tensor(first_ids, dtype=torch.int64),
        num_action_tokens=share.num_action_tokens,
        num_sequences=share.num_sequences,
    )


def micro_batches(
    batch: TokenBatch, share: UpdateShare, layout: SequenceLayout, experts_TLK: torch.Tensor | None = None
) -> list[MicroBatch]:
    """A packed row for each of `share.micro_batches`; one without sequences is a dummy. `experts_TLK`: as
    `replay.routed_experts` gives them."""
    bounds = batch.cu_seqlens_N1.tolist()
    made = []
    for members in share.micro_batches:
        pieces = [torch.arange(bounds[n], bounds[n + 1], device=batch.token_ids_T.device) for n in members]
        made.append(_assemble(pieces, batch.token_ids_T, batch.action_T, layout, experts_TLK))
    return made


def probe(token_ids: torch.Tensor, layout: SequenceLayout) -> MicroBatch:
    """One sequence, int64 [n], every token but the first a target; `source_P` indexes `token_ids`."""
    everything = torch.arange(token_ids.shape[0], device=token_ids.device)
    return _assemble([everything], token_ids, torch.ones_like(token_ids, dtype=torch.bool), layout)


def dummy(layout: SequenceLayout, device: torch.device) -> MicroBatch:
    """The shortest row that every rank can run; it has no target."""
    return _assemble([], torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device), layout)


def _assemble(
    pieces: list[torch.Tensor],
    token_ids_T: torch.Tensor,
    wanted_T: torch.Tensor,
    layout: SequenceLayout,
    experts_TLK: torch.Tensor | None = None,
) -> MicroBatch:
    """`pieces`: token indices of each sequence; the targets are the `wanted_T` tokens."""
    device = token_ids_T.device
    lengths = padded_lengths([len(p) for p in pieces], layout)
    token_ids, positions, targets, sources, experts = [], [], [], [], []
    for i, length in enumerate(lengths):
        piece = pieces[i] if i < len(pieces) else token_ids_T.new_empty(0)
        n = len(piece)
        token_P = torch.full((length,), PADDING_TOKEN, dtype=torch.int64, device=device)
        target_P = torch.full_like(token_P, NO_TARGET)
        source_P = torch.full_like(token_P, -1)
        token_P[:n] = token_ids_T[piece]
        if n > 1:
            following = piece[1:]
            wanted = wanted_T[following].bool()
            target_P[: n - 1] = torch.where(wanted, token_ids_T[following], NO_TARGET)
            source_P[: n - 1] = torch.where(wanted, following, -1)
        keep = _local(length, layout, device)
        token_ids.append(token_P[keep])
        positions.append(torch.arange(length, device=device)[keep])
        targets.append(target_P[keep])
        sources.append(source_P[keep])
        if experts_TLK is not None:
            experts.append(_routed(experts_TLK, piece, length)[keep])
    cu_seqlens_M1 = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    target_P, source_P = torch.cat(targets), torch.cat(sources)
    head_R = (target_P != NO_TARGET).nonzero()[:, 0]
    if not head_R.shape[0]:
        head_R = head_R.new_zeros(1)
    return MicroBatch(
        torch.cat(token_ids)[None],
        torch.cat(positions)[None],
        target_P,
        source_P,
        head_R,
        target_P[head_R],
        source_P[head_R],
        cu_seqlens_M1,
        max(lengths),
        torch.cat(experts) if experts else None,
    )


def _routed(experts_TLK: torch.Tensor, piece: torch.Tensor, length: int) -> torch.Tensor:
    """Experts of a sequence's own tokens, the first ones of its padding."""
    layers, top_k = experts_TLK.shape[1:]
    first_K = torch.arange(top_k, dtype=experts_TLK.dtype, device=experts_TLK.device)
    padding = first_K.expand(length - len(piece), layers, top_k)
    return torch.cat([experts_TLK[piece], padding])


def padded_lengths(lengths: Sequence[int], layout: SequenceLayout) -> list[int]:
    """Lengths of the sequences as they are run; a row without sequences is one sequence of padding.

    With CP each is a multiple of 2 CP; the last one grows until this rank's row is a multiple of TP under sequence
    parallelism, of whole blocks on each.
    """
    unit = 2 * layout.context_parallel if layout.context_parallel > 1 else 1
    padded = [-(-n // unit) * unit for n in lengths] or [unit]
    whole = layout.sequence_parallel * layout.context_parallel * layout.block
    padded[-1] += -sum(padded) % math.lcm(unit, whole)
    return padded


def _local(length: int, layout: SequenceLayout, device: torch.device) -> torch.Tensor:
    """Positions of a sequence on this context-parallel rank: chunks r and 2 CP - 1 - r of 2 CP."""
    everything = torch.arange(length, device=device)
    size = layout.context_parallel
    if size == 1:
        return everything
    chunks = everything.view(2 * size, -1)
    return torch.cat([chunks[layout.context_rank], chunks[2 * size - 1 - layout.context_rank]])
