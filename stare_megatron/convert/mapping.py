"""Either kind of checkpoint seen as the other, a block of rows at a time: the bridge's table is all they share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from stare_megatron.convert.torch_dist import Box, TorchDist, cut
from stare_megatron.errors import UserError
from stare_megatron.models.entries import ParameterEntry, entries, segments
from stare_megatron.models.shape import ModelShape, Split
from stare_megatron.models.shards import Checkpoint, TensorInfo

# Maps of files are dropped after so many bytes read through them: they count as resident memory.
_RELEASE_BYTES = 128 << 20
_COLUMNS = (Split.ROW, Split.EXPERT_ROW)


def by_key(shape: ModelShape) -> dict[str, ParameterEntry]:
    """Tensors of a distributed checkpoint, which hold all layers; an entry stands for its parameter in every layer."""
    return {entry.saved: entry for entry in entries(shape) if entry.layer in (None, 0)}


def lead(entry: ParameterEntry, shape: ModelShape) -> tuple[int, ...]:
    """Axes before the parameter's own: layers, experts."""
    layers = () if entry.layer is None else (shape.layers,)
    return (*layers, entry.experts(shape)) if entry.of_experts else layers


def _index(entry: ParameterEntry, expert: int) -> tuple[int, ...]:
    """Where along the axes of `lead` a parameter lies."""
    where = () if entry.layer is None else (entry.layer,)
    return (*where, expert) if entry.of_experts else where


def whole(entry: ParameterEntry, shape: ModelShape, padded_vocab: int) -> tuple[int, ...]:
    """Global shape in a distributed checkpoint."""
    wants = entry.wants(shape)
    rows = padded_vocab if entry.tensor.layout is Split.VOCAB else sum(want[0] for want in wants)
    return (*lead(entry, shape), rows, *wants[0][1:])


def mcore_tensors(shape: ModelShape, dtype: torch.dtype, padded_vocab: int) -> dict[str, TensorInfo]:
    """Every tensor of the model in a distributed checkpoint."""
    return {key: TensorInfo(dtype, whole(entry, shape, padded_vocab)) for key, entry in by_key(shape).items()}


def mcore_objects(shape: ModelShape) -> Iterator[str]:
    """Keys of the (empty) objects that Megatron-Core's linears and Transformer Engine's linears, norms and attention
    ask for where others than this package load the checkpoint: the scales of FP8, had there been any."""
    yield "decoder.final_layernorm._extra_state/shard_0_1"
    first = [entry for entry in entries(shape) if entry.layer == 0]
    modules = {"decoder.layers.self_attention.core_attention": first[0]}
    modules |= {entry.saved.removesuffix(".weight"): entry for entry in first if entry.saved.endswith(".weight")}
    modules.pop("decoder.layers.mlp.router", None)  # neither kind of linear
    for module, entry in modules.items():
        for layer in range(shape.layers):
            if not entry.of_experts:
                yield f"{module}._extra_state/shard_{layer}_{shape.layers}"
                continue
            number = entry.experts(shape)
            for expert in range(number):
                yield f"{module}._extra_state/shard_{layer}.{expert}_{shape.layers}.{number}"


def pieces(shape: ModelShape, itemsize: int, padded_vocab: int, ranks: int, limit: int) -> Iterator[tuple[str, Box]]:
    """The blocks a distributed checkpoint is written in, in the order of the layers.

    `ranks`: tensors are cut where so many tensor-parallel ranks split them, so that each reads its own only; `limit`:
    and again, into at most so many bytes.
    """
    for entry in entries(shape):
        axes = lead(entry, shape)
        rows, *columns = whole(entry, shape, padded_vocab)[len(axes) :]
        for expert in range(entry.experts(shape)):
            where = _index(entry, expert)
            for row, count, column, width in _splits(entry, rows, columns, ranks):
                inner = ((row, column), (count, width)) if columns else ((row,), (count,))
                block = Box((*where, *inner[0]), (*(1,) * len(where), *inner[1]))
                for slab in cut(block, itemsize, limit):
                    yield entry.saved, slab


def _splits(entry: ParameterEntry, rows: int, columns: list[int], ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """First row, rows, first column, columns of each part."""
    layout, width = entry.tensor.layout, columns[0] if columns else 1
    if layout in _COLUMNS:
        for rank in range(ranks):
            yield 0, rows, width // ranks * rank, width // ranks
    else:
        gated = layout in (Split.GATED, Split.EXPERT_GATED)
        parts = 1 if layout is Split.REPLICATED else 2 * ranks if gated else ranks
        for part in range(parts):
            yield rows // parts * part, rows // parts, 0, width


class HfAsMcore:
    """Blocks of a distributed checkpoint's tensors, made from a Hugging Face checkpoint."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self._file, self._shape = Checkpoint(folder), shape
        self._entries = {(entry.saved, entry.layer): entry for entry in entries(shape)}
        self._read = 0

    def read(self, key: str, box: Box, dtype: torch.dtype) -> torch.Tensor:
        """The block `box` of the tensor `key`, which lies in one layer (and one expert); rows of padding are zero."""
        shape = self._shape
        layered = (key, None) not in self._entries
        entry = self._entries[key, box.offsets[0] if layered else None]
        axes = len(lead(entry, shape))
        expert = box.offsets[1] if entry.of_experts else 0
        first, count = box.offsets[axes], box.sizes[axes]
        columns = [slice(a, a + n) for a, n in zip(box.offsets[axes + 1 :], box.sizes[axes + 1 :], strict=True)]
        out = torch.zeros(box.sizes[axes:], dtype=dtype)
        names, wants = entry.names(expert), entry.wants(shape)
        for segment in segments(entry, shape):
            shared = segment.shared(first, first + count, of_mcore=True)
            if shared is not None:
                rows = slice(segment.hf + shared[0], segment.hf + shared[1])
                at = segment.mcore - first
                out[at + shared[0] : at + shared[1]] = self._file.read(
                    names[segment.part], wants[segment.part], rows, *columns
                )
        self._read += out.nbytes
        if self._read > _RELEASE_BYTES:
            self._file.release()
            self._read = 0
        return out.view(box.sizes)


class McoreAsHf:
    """Rows of Hugging Face's tensors, read from a distributed checkpoint."""

    def __init__(self, dist: TorchDist, shape: ModelShape) -> None:
        self._dist, self._shape = dist, shape
        self._places = {
            name: (entry, expert, part)
            for entry in entries(shape)
            for expert in range(entry.experts(shape))
            for part, name in enumerate(entry.names(expert))
        }

    def read(self, name: str, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows [first, last) of the tensor `name`."""
        entry, expert, part = self._places[name]
        shape = self._shape
        want = entry.wants(shape)[part]
        where = _index(entry, expert)
        out = torch.empty((last - first, *want[1:]), dtype=dtype)
        for segment in segments(entry, shape):
            shared = segment.shared(first, last, of_mcore=False) if segment.part == part else None
            if shared is None:
                continue
            offsets = (*where, segment.mcore + shared[0], *(0 for _ in want[1:]))
            sizes = (*(1 for _ in where), shared[1] - shared[0], *want[1:])
            value = self._dist.read(entry.saved, Box(offsets, sizes))
            at = segment.hf - first
            out[at + shared[0] : at + shared[1]] = value.view(sizes[len(where) :])
        return out


def check_fits(dist: TorchDist, shape: ModelShape, config: Path) -> None:
    """Whether a distributed checkpoint holds the model of a configuration, by the names and shapes of its tensors.

    Raises:
        UserError: it is of another model; the message names a tensor.
    """
    model = {key: info for key, info in dist.tensors.items() if not key.startswith("optimizer.")}
    wanted = by_key(shape)
    for key, entry in wanted.items():
        if key not in model:
            raise UserError(
                f"{dist.folder}: no tensor {key!r}, which the model of {config} has; a checkpoint of another?"
            )
        have = model[key].shape
        want = whole(entry, shape, have[0] if entry.tensor.layout is Split.VOCAB else 0)
        if have != want or (entry.tensor.layout is Split.VOCAB and have[0] < shape.vocab):
            want = whole(entry, shape, shape.vocab)
            raise UserError(
                f"{dist.folder}: {key!r} has shape {list(have)}, the model of {config} asks for {list(want)}; a "
                f"checkpoint of another model?"
            )
    for key in model:
        if key not in wanted:
            raise UserError(f"{dist.folder}: {key!r} has no place in the model of {config}; of another model?")
