"""Core attention on torch's scaled-dot-product kernels: causal, packed, context-parallel.

It stands where `TEDotProductAttention` would; upstream's own local one refuses packed sequences and context
parallelism. Sequences of similar length are attended as one right-padded batch: a causal mask hides the padding from
every real query, so the result is that of each sequence alone, and a pack costs the sum of its sequences' squares.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class _Plan:
    """How a pack is attended: batches of sequences, end to end in one padded row.

    `take_P` int64: token index of each place of the row, padding points at token 0. `shapes`: (B, L) of each batch.
    `place_T` int64: where each token is in the row. `whole`: the pack is one batch as it is, so that nothing moves.
    """

    take_P: torch.Tensor
    shapes: tuple[tuple[int, int], ...]
    place_T: torch.Tensor
    whole: bool


def _rounded(length: int) -> int:
    """Up to the next of four steps per power of two, from 8 on: at most a quarter is padding."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


@functools.lru_cache(maxsize=16)
def _plan(lengths: tuple[int, ...], device: torch.device) -> _Plan:
    """Group sequences of a pack by rounded length. All layers of a micro-batch share one plan."""
    starts = [0, *itertools.accumulate(lengths)]
    members: dict[int, list[int]] = defaultdict(list)
    for n, length in enumerate(lengths):
        if length:
            members[_rounded(length)].append(n)
    if not members:
        raise ValueError("a pack without tokens")
    take, shapes, place_T, begin = [], [], torch.empty(starts[-1], dtype=torch.int64), 0
    for ns in members.values():
        widest = max(lengths[n] for n in ns)
        start_B1 = torch.tensor([[starts[n]] for n in ns])
        length_B1 = torch.tensor([[lengths[n]] for n in ns])
        offset_1L = torch.arange(widest)[None]
        real_BL = offset_1L < length_B1
        take_BL = torch.where(real_BL, start_B1 + offset_1L, 0)
        place_T[take_BL[real_BL]] = begin + real_BL.flatten().nonzero().flatten()
        take.append(take_BL.flatten())
        shapes.append((len(ns), widest))
        begin += len(ns) * widest
    whole = len(shapes) == 1 and begin == starts[-1]
    return _Plan(torch.cat(take).to(device), tuple(shapes), place_T.to(device), whole)


def _sdpa(q_BLHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last L of S positions; H is a multiple of the G key-value heads. Returns [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSGD, v_BSGD))
    length, keys = q.shape[2], k.shape[2]
    mask = None
    if length != keys:
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def packed(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, lengths: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Causal attention within each sequence of a pack; returns [T, H, D].

    Tokens move to their batches, and back, in one gather each: one for each batch would cost its backward pass a
    gradient of the whole pack each time.
    """
    plan = _plan(lengths, q_THD.device)
    rows = (q_THD, k_TGD, v_TGD) if plan.whole else [x.index_select(0, plan.take_P) for x in (q_THD, k_TGD, v_TGD)]
    sizes = [batch * length for batch, length in plan.shapes]
    outs = [
        _sdpa(*(x.unflatten(0, shape) for x in batch), scale).flatten(0, 1)  # pyright: ignore[reportCallIssue]
        for shape, *batch in zip(plan.shapes, *(x.split(sizes) for x in rows), strict=True)
    ]
    out_PHD = torch.cat(outs)
    return out_PHD if plan.whole else out_PHD.index_select(0, plan.place_T)


@functools.lru_cache(maxsize=16)
def _zigzag(lengths: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    """Of each token of a pack, its place where the ranks' tokens are gathered end to end; int64 [T x CP]."""
    tokens, places, start = sum(lengths) // size, [], 0
    for length in lengths:
        chunk = length // (2 * size)
        # Chunk c lives on rank c (first half of the sequence) or 2 CP - 1 - c (second half).
        for c in range(2 * size):
            begin = c * tokens + start if c < size else (2 * size - 1 - c) * tokens + start + chunk
            places.append(torch.arange(begin, begin + chunk))
        start += 2 * chunk
    return torch.cat(places).to(device)


def packed_context_parallel(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    group: ProcessGroup,
) -> torch.Tensor:
    """The same, where each sequence is cut into 2 x CP chunks and rank r holds chunks r and 2 CP - 1 - r (zigzag).

    `lengths`: of the whole sequences, each a multiple of 2 x CP; T counts this rank's tokens. Keys and values are
    gathered over `group`. Returns [T, H, D].
    """
    size, rank = group.size(), group.rank()
    # Forward gathers along dimension 0, backward sums each rank's share of the gradient over the group.
    order = _zigzag(lengths, size, q_THD.device)
    keys, values = (
        gather_from_sequence_parallel_region(x.contiguous(), group=group).index_select(0, order).split(lengths)
        for x in (k_TGD, v_TGD)
    )
    chunks = [length // (2 * size) for length in lengths for _ in range(2)]
    outs = []
    for n, q in enumerate(q_THD.split(chunks)):
        c = (rank, 2 * size - 1 - rank)[n % 2]
        seen = (c + 1) * q.shape[0]
        outs.append(_sdpa(q[None], keys[n // 2][None, :seen], values[n // 2][None, :seen], scale)[0])
    return torch.cat(outs)


class SdpaAttention(MegatronModule):
    """The `core_attention` of the local layer spec. No dropout, no bias, causal only."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attention_type != "self" or (config.attention_dropout if attention_dropout is None else attention_dropout):
            raise ValueError("SdpaAttention is self-attention without dropout")
        assert pg_collection is not None
        assert config.kv_channels is not None
        self._cp = pg_collection.cp
        self._scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [S, B, H, D] (packed: [T, H, D]), key and value with G heads; returns [S, B, H * D] (or [T, H * D])."""
        if attention_bias is not None or attention_mask is not None:
            raise ValueError("SdpaAttention is causal: it takes neither a mask nor a bias")
        if packed_seq_params is None:
            if self._cp.size() > 1:
                raise ValueError("context parallelism needs packed sequences (PackedSeqParams)")
            out = _sdpa(*(x.transpose(0, 1) for x in (query, key, value)), self._scale)  # pyright: ignore[reportCallIssue]
            return out.transpose(0, 1).flatten(2)
        lengths = _lengths(packed_seq_params)
        if self._cp.size() > 1:
            out = packed_context_parallel(query, key, value, lengths, self._scale, self._cp)
        else:
            out = packed(query, key, value, lengths, self._scale)
        return out.flatten(1)


def _lengths(params: PackedSeqParams) -> tuple[int, ...]:
    """Lengths of a pack's sequences (with their padding, if any), tokens over all context-parallel ranks."""
    cu = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
    assert cu is not None
    bounds = cu.tolist()
    return tuple(b - a for a, b in itertools.pairwise(bounds))
