"""How one tensor is split: reading a rank's slice of a file, and putting the slices of all ranks together again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stare_megatron.errors import UserError
from stare_megatron.trainer.bridge.shape import Layout, ModelShape


class Checkpoint:
    """The safetensors files of a Hugging Face checkpoint; tensors are read by slices.

    Raises:
        UserError: no weights, a damaged file, a missing tensor or one of another shape than config.json says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        self._open: dict[str, Any] = {}
        if index.exists():
            try:
                self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as e:
                raise UserError(f"{index}: not a safetensors index: {e!r}") from e
        elif single.exists():
            self._file_of = dict.fromkeys(self._handle(single.name).keys(), single.name)
        else:
            raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as e:
                raise UserError(f"{self.folder / file}: cannot read the weights: {e}") from e
        return self._open[file]

    def read(self, name: str, want: Sequence[int], *where: slice) -> torch.Tensor:
        """`tensor[where]` of the tensor `name`, whose full shape must be `want`; in the file's dtype."""
        if name not in self._file_of:
            raise UserError(f"{self.folder}: the tensor {name!r} is missing from the checkpoint")
        view = self._handle(self._file_of[name]).get_slice(name)
        have = tuple(view.get_shape())
        if have != tuple(want):
            raise UserError(f"{self.folder}: {name!r} has shape {have}, config.json asks for {tuple(want)}")
        return view[where or (slice(None),)]


def full_shapes(layout: Layout, shape: ModelShape, last: str) -> list[tuple[int, ...]]:
    """Full shapes of the Hugging Face tensors of one parameter (of one expert); `last`: its Megatron-Core name."""
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
    if layout is Layout.VOCAB:
        return [(shape.vocab, hidden)]
    if layout is Layout.QKV:
        return [(n, hidden) if last.endswith("weight") else (n,) for n in (q, kv, kv)]
    if layout is Layout.GATED:
        return [(shape.ffn, hidden)] * 2
    if layout is Layout.ROW:
        return [(hidden, q if "linear_proj" in last else shape.ffn)]
    if layout in (Layout.EXPERT_GATED, Layout.EXPERT_ROW):
        assert shape.experts is not None
        ffn = shape.experts.ffn
        return [(ffn, hidden)] * 2 if layout is Layout.EXPERT_GATED else [(hidden, ffn)]
    if "router" in last:
        assert shape.experts is not None
        return [(shape.experts.number, hidden)]
    return [(shape.head_dim,) if "q_layernorm" in last or "k_layernorm" in last else (hidden,)]


def _part(size: int, rank: int, of: int) -> slice:
    return slice(size // of * rank, size // of * (rank + 1))


def read_shard(
    file: Checkpoint,
    layout: Layout,
    names: Sequence[str],
    wants: Sequence[Sequence[int]],
    shape: ModelShape,
    rank: int,
    size: int,
    rows: int,
) -> torch.Tensor:
    """This rank's Megatron-Core tensor, read from its slices only. `rows`: its rows, padding included (VOCAB)."""
    if layout is Layout.REPLICATED:
        return file.read(names[0], wants[0])
    if layout in (Layout.ROW, Layout.EXPERT_ROW):
        return file.read(names[0], wants[0], slice(None), _part(wants[0][1], rank, size))
    if layout is Layout.VOCAB:
        first, last = min(rank * rows, shape.vocab), min((rank + 1) * rows, shape.vocab)
        real = file.read(names[0], wants[0], slice(first, last))
        return torch.cat([real, real.new_zeros(rows - len(real), shape.hidden)])
    parts = [file.read(n, w, _part(w[0], rank, size)) for n, w in zip(names, wants, strict=True)]
    if layout is Layout.QKV:
        return torch.cat([p.unflatten(0, (shape.kv_groups // size, -1)) for p in parts], dim=1).flatten(0, 1)
    return torch.cat(parts)


def merge(layout: Layout, shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
    """The full Hugging Face tensors from every rank's shard: the inverse of `read_shard`."""
    if layout is Layout.REPLICATED:
        return [shards[0]]
    if layout in (Layout.ROW, Layout.EXPERT_ROW):
        return [torch.cat(list(shards), dim=1)]
    if layout is Layout.VOCAB:
        return [torch.cat(list(shards))[: shape.vocab]]
    if layout is Layout.QKV:
        per_group = torch.cat(list(shards)).unflatten(0, (shape.kv_groups, -1))
        queries = shape.heads // shape.kv_groups * shape.head_dim
        return [x.flatten(0, 1) for x in per_group.split([queries, shape.head_dim, shape.head_dim], dim=1)]
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])]
