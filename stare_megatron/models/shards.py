"""How one tensor is split: reading a rank's slice of a file, and putting the slices of all ranks together again."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stare_megatron.errors import UserError
from stare_megatron.models.shape import ModelShape, Split

# What safetensors calls the dtypes that weights come in.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Written by old exports of rotary embeddings; computed from the configuration since.
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"


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
            path = self.folder / file
            try:
                self._open[file] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError as e:
                raise UserError(f"{path}: missing, but listed in the index; fetch or convert it again") from e
            except (SafetensorError, OSError) as e:
                raise UserError(
                    f"{path}: cannot read the weights, truncated or damaged: {e}; fetch or convert it again"
                ) from e
        return self._open[file]

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, sorted."""
        return tuple(sorted(self._file_of))

    @property
    def files(self) -> tuple[str, ...]:
        """Every file with weights, sorted."""
        return tuple(sorted(set(self._file_of.values())))

    def file_of(self, name: str) -> str:
        """Raises: UserError: no such tensor."""
        if name not in self._file_of:
            raise UserError(f"{self.folder}: the tensor {name!r} is missing from the checkpoint")
        return self._file_of[name]

    def info(self, name: str) -> TensorInfo:
        view = self._view(name)
        kind = view.get_dtype()
        if kind not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise UserError(f"{self.folder}: {name!r} is stored as {kind}; only {known} are read")
        return TensorInfo(_DTYPES[kind], tuple(view.get_shape()))

    def refuse_unknown(self, known: Collection[str], tied: bool) -> None:
        """Refuse a tensor that the architecture does not have: it would be left out of the model without a word.

        `tied`: a copy of the embedding as `lm_head.weight` is nothing new then.
        """
        for name in self.names:
            if name not in known and not name.endswith(_HARMLESS_SUFFIX) and not (tied and name == "lm_head.weight"):
                raise UserError(
                    f"{self.folder}: the tensor {name!r} has no place in the architecture of config.json; is this a "
                    f"checkpoint of another model?"
                )

    def release(self) -> None:
        """Unmap the files. What was read through a map counts as resident memory until then."""
        self._open.clear()

    def read(self, name: str, want: Sequence[int], *where: slice) -> torch.Tensor:
        """`tensor[where]` of the tensor `name`, whose full shape must be `want`; in the file's dtype."""
        view = self._view(name)
        have = tuple(view.get_shape())
        if have != tuple(want):
            raise UserError(f"{self.folder}: {name!r} has shape {have}, config.json asks for {tuple(want)}")
        return view[where or (slice(None),)]

    def _view(self, name: str) -> Any:
        file = self.file_of(name)
        try:
            return self._handle(file).get_slice(name)
        except SafetensorError as e:
            raise UserError(
                f"{self.folder / file}: the tensor {name!r} is missing, though the index places it there; fetch or "
                f"convert the checkpoint again"
            ) from e


def _part(size: int, rank: int, of: int) -> slice:
    return slice(size // of * rank, size // of * (rank + 1))


def read_shard(
    file: Checkpoint,
    layout: Split,
    names: Sequence[str],
    wants: Sequence[Sequence[int]],
    shape: ModelShape,
    rank: int,
    size: int,
    rows: int,
) -> torch.Tensor:
    """This rank's Megatron-Core tensor, read from its slices only. `rows`: its rows, padding included (VOCAB)."""
    if layout is Split.REPLICATED:
        return file.read(names[0], wants[0])
    if layout in (Split.ROW, Split.EXPERT_ROW):
        return file.read(names[0], wants[0], slice(None), _part(wants[0][1], rank, size))
    if layout is Split.VOCAB:
        first, last = min(rank * rows, shape.vocab), min((rank + 1) * rows, shape.vocab)
        real = file.read(names[0], wants[0], slice(first, last))
        return torch.cat([real, real.new_zeros(rows - len(real), shape.hidden)])
    parts = [file.read(n, w, _part(w[0], rank, size)) for n, w in zip(names, wants, strict=True)]
    if layout is Split.QKV:
        return torch.cat([p.unflatten(0, (shape.kv_groups // size, -1)) for p in parts], dim=1).flatten(0, 1)
    return torch.cat(parts)


def merge(layout: Split, shards: Sequence[torch.Tensor], shape: ModelShape) -> list[torch.Tensor]:
    """The full Hugging Face tensors from every rank's shard: the inverse of `read_shard`."""
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
