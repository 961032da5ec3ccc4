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
class _Bucket:
    """Sequences attended as one batch. `take_BL` int64: token index of each place, padding points at token 0.

    `put_M`: places (flattened B x L) of the real tokens; `tokens_M`: their token indices. `whole`: the batch is the
    whole pack in its order, so that nothing has to move.
    """

    take_BL: torch.Tensor
    put_M: torch.Tensor
    tokens_M: torch.Tensor
    whole: bool


def _rounded(length: int) -> int:
    """Up to the next of four steps per power of two, from 8 on: at most a quarter is padding."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


@functools.lru_cache(maxsize=16)
def _plan(lengths: tuple[int, ...], place: torch.device) -> tuple[_Bucket, ...]:
    """Group sequences of a pack by rounded length. All layers of a micro-batch share one plan."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    members: dict[int, list[int]] = defaultdict(list)
    for n, length in enumerate(lengths):
        if length:
            members[_rounded(length)].append(n)
    buckets = []
    for ns in members.values():
        widest = max(lengths[n] for n in ns)
        start_B1 = torch.tensor([[starts[n]] for n in ns])
        length_B1 = torch.tensor([[lengths[n]] for n in ns])
        offset_1L = torch.arange(widest)[None]
        real_BL = offset_1L < length_B1
        take_BL = torch.where(real_BL, start_B1 + offset_1L, 0)
        put_M = real_BL.flatten().nonzero().flatten()
        whole = len(members) == 1 and bool(real_BL.all()) and len(ns) == len(lengths)
        buckets.append(_Bucket(take_BL.to(place), put_M.to(place), take_BL[real_BL].to(place), whole))
    return tuple(buckets)


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
    """Causal attention within each sequence of a pack; returns [T, H, D]."""
    tokens = q_THD.shape[0]
    out = None
    for b in _plan(lengths, q_THD.device):
        if b.whole:
            shape = (*b.take_BL.shape, -1)
            return _sdpa(*(x.unflatten(0, shape[:2]) for x in (q_THD, k_TGD, v_TGD)), scale).flatten(0, 1)  # pyright: ignore[reportCallIssue]
        flat = b.take_BL.flatten()
        batch = (x.index_select(0, flat).unflatten(0, b.take_BL.shape) for x in (q_THD, k_TGD, v_TGD))
        attended_MHD = _sdpa(*batch, scale).flatten(0, 1).index_select(0, b.put_M)  # pyright: ignore[reportCallIssue]
        if out is None:
            out = attended_MHD.new_zeros((tokens, *attended_MHD.shape[1:]))
        out = out.index_copy(0, b.tokens_M, attended_MHD)
    if out is None:
        raise ValueError("a pack without tokens")
    return out


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
    keys, values = (
        gather_from_sequence_parallel_region(x.contiguous(), group=group).unflatten(0, (size, -1))
        for x in (k_TGD, v_TGD)
    )
    # Chunk c lives on rank c (first half of the sequence) or 2 CP - 1 - c (second half).
    owner = [c if c < size else 2 * size - 1 - c for c in range(2 * size)]
    half = [0 if c < size else 1 for c in range(2 * size)]
    outs, start = [], 0
    for length in lengths:
        chunk = length // (2 * size)
        local = slice(start, start + 2 * chunk)

        def whole(x: torch.Tensor, start: int = start, chunk: int = chunk) -> torch.Tensor:
            parts = [x[o, start + h * chunk : start + (h + 1) * chunk] for o, h in zip(owner, half, strict=True)]
            return torch.cat(parts)[None]

        k_full, v_full, q = whole(keys), whole(values), q_THD[local]
        for h, c in enumerate((rank, 2 * size - 1 - rank)):
            seen = (c + 1) * chunk
            outs.append(_sdpa(q[None, h * chunk : (h + 1) * chunk], k_full[:, :seen], v_full[:, :seen], scale)[0])
        start += 2 * chunk
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
