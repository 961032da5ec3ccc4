"""How one tensor is split: reading a rank's slice of a file, and putting the slices of all ranks together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stare_megatron.errors import UserError
from stare_megatron.models.entries import full_shapes, parts
from stare_megatron.models.shape import ModelShape, Split, Tensor
from stare_megatron.models.weights import Stored, check_dtype, read_headers

# By what safetensors calls them.
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The safetensors files of a Hugging Face checkpoint; tensors are read by slices.

    Raises:
        UserError: no weights, a damaged file, a missing tensor or one of another shape than config.json says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.headers = read_headers(self.folder)
        self._open: dict[str, Any] = {}

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as e:
                raise UserError(
                    f"{path}: cannot read the weights, truncated or damaged: {e}; fetch or convert it again"
                ) from e
        return self._open[file]

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, sorted."""
        return tuple(sorted(self.headers))

    def info(self, name: str) -> TensorInfo:
        """Raises: UserError: no such tensor, or one of a dtype that is not read."""
        stored = self._stored(name)
        check_dtype(self.folder, name, stored)
        return TensorInfo(TORCH_DTYPES[stored.dtype], stored.shape)

    def _stored(self, name: str) -> Stored:
        if name not in self.headers:
            raise UserError(f"{self.folder}: the tensor {name!r} is missing from the checkpoint")
        return self.headers[name]

    def release(self) -> None:
        """Unmap the files. What was read through a map counts as resident memory until then."""
        self._open.clear()

    def read(self, name: str, want: Sequence[int], *where: slice) -> torch.Tensor:
        """`tensor[where]` of the tensor `name`, whose full shape must be `want`; in the file's dtype."""
        stored = self._stored(name)
        if stored.shape != tuple(want):
            raise UserError(f"{self.folder}: {name!r} has shape {stored.shape}, config.json asks for {tuple(want)}")
        return self._handle(stored.file).get_slice(name)[where or (slice(None),)]


def _part(size: int, rank: int, of: int) -> slice:
    return slice(size // of * rank, size // of * (rank + 1))


def read_shard(
    file: Checkpoint,
    tensor: Tensor,
    names: Sequence[str],
    shape: ModelShape,
    rank: int,
    size: int,
    rows: int,
) -> torch.Tensor:
    """This rank's Megatron-Core tensor, read from its slices only. `names`: of the Hugging Face tensors; `rows`: of the
    rank's, padding included (VOCAB)."""
    layout, wants = tensor.layout, full_shapes(tensor, shape)
    if layout is Split.REPLICATED:
        return file.read(names[0], wants[0])
    if layout in (Split.ROW, Split.EXPERT_ROW):
        return file.read(names[0], wants[0], slice(None), _part(wants[0][1], rank, size))
    if layout is Split.VOCAB:
        first, last = min(rank * rows, shape.vocab), min((rank + 1) * rows, shape.vocab)
        real = file.read(names[0], wants[0], slice(first, last))
        return torch.cat([real, real.new_zeros(rows - len(real), shape.hidden)])
    pieces = []
    for part in parts(tensor, shape):
        first = part.first + part.rows // size * rank
        pieces.append(file.read(names[part.tensor], wants[part.tensor], slice(first, first + part.rows // size)))
    if layout is Split.QKV:
        return torch.cat([p.unflatten(0, (shape.kv_groups // size, -1)) for p in pieces], dim=1).flatten(0, 1)
    return torch.cat(pieces)


def merge(tensor: Tensor, shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
    """The full Hugging Face tensors from every rank's shard: the inverse of `read_shard`."""
    whole = _parts_of(tensor.layout, shards, shape)
    return whole if len(whole) == len(tensor.names) else [torch.cat(whole)]


def _parts_of(layout: Split, shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
    if layout is Split.REPLICATED:
        return [shards[0]]
    if layout in (Split.ROW, Split.EXPERT_ROW):
        return [torch.cat(list(shards), dim=1)]
    if layout is Split.VOCAB:
        return [torch.cat(list(shards))[: shape.vocab]]
    if layout is Split.QKV:
        per_group = torch.cat(list(shards)).unflatten(0, (shape.kv_groups, -1))
        queries = shape.heads // shape.kv_groups * shape.head_dim
        return [x.flatten(0, 1) for x in per_group.split([queries, shape.head_dim, shape.head_dim], dim=1)]
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])]
