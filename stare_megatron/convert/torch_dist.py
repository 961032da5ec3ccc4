"""Megatron-Core's distributed checkpoints (`torch_dist`), read and written piece by piece, without process groups.

The format is torch.distributed.checkpoint's: `.metadata` (a pickle: global shapes, and where each piece of a tensor
lies) and `*.distcp` files, which hold one torch.save archive a piece; beside them Megatron-Core's `metadata.json` and,
before 0.19, `common.pt`. torch's own writer keeps every tensor of a file in memory until the file is closed, and its
reader wants a model to load into.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from stare_megatron.data.tokenizer import first_line
from stare_megatron.errors import UserError
from stare_megatron.models.shards import TensorInfo

INDEX, FORMAT, COMMON = ".metadata", "metadata.json", "common.pt"
_COMMON_KEY = "common_state/"  # of the object that Megatron-Core 0.19 writes in the place of `common.pt`
_PLAIN: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
_AGAIN = "copy or convert the checkpoint again"
# What a damaged pickle may raise while it is read.
_DAMAGE = (
    OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError,
    ValueError, TypeError, OverflowError, MemoryError, AssertionError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it begins and its extent, by dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def meet(self, other: Box) -> Box | None:
        """What two blocks share."""
        low = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        high = [
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(h - a for a, h in zip(low, high, strict=True))
        return Box(low, sizes) if all(n > 0 for n in sizes) else None

    def inside(self, outer: Box) -> bool:
        """Whether this block is a part of `outer`. Raises ValueError for another number of dimensions."""
        bounds = zip(self.offsets, self.sizes, outer.offsets, outer.sizes, strict=True)
        return all(b <= a and n >= 0 and a + n <= b + m for a, n, b, m in bounds)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The index of this block in a tensor that is `outer`."""
        starts = (a - b for a, b in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(s, s + n) for s, n in zip(starts, self.sizes, strict=True))


@dataclass(frozen=True)
class Stored:
    """Where one piece lies: `file` of the checkpoint, `offset` and `length` in bytes. `box` is None for an object."""

    key: str
    box: Box | None
    file: str
    offset: int
    length: int


class TorchDist:
    """A distributed checkpoint, for reading.

    Raises:
        UserError: not such a checkpoint, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_format(folder)
        index = _read_index(folder / INDEX)
        self.tensors: dict[str, TensorInfo] = {}
        self._pieces: dict[str, list[Stored]] = {}
        self._cached: tuple[Stored | None, torch.Tensor] = (None, torch.empty(0))
        self._common: Stored | None = None
        try:
            self.objects: tuple[str, ...] = tuple(
                key for key, value in index.state_dict_metadata.items() if isinstance(value, BytesStorageMetadata)
            )
            self._take(index)
        except _DAMAGE as e:
            raise UserError(f"{folder / INDEX}: damaged: {type(e).__name__}: {first_line(e)}; {_AGAIN}") from e
        self._check_files()

    def _take(self, index: Metadata) -> None:
        """The index's tensors and where they lie; a damaged index raises whatever of `_DAMAGE`."""
        where: dict[tuple[str, tuple[int, ...]], Any] = {
            (i.fqn, tuple(i.offset or ())): info for i, info in (index.storage_data or {}).items()
        }
        for key, value in index.state_dict_metadata.items():
            if isinstance(value, BytesStorageMetadata):
                if key.startswith(_COMMON_KEY):
                    self._common = _stored(key, None, where[key, ()])
                continue
            if not isinstance(value, TensorStorageMetadata) or not isinstance(value.properties.dtype, torch.dtype):
                raise ValueError(f"{key!r} is neither a tensor nor an object")
            whole = Box((0,) * len(value.size), tuple(map(int, value.size)))
            most = math.prod(max(n, 1) for n in whole.sizes) * value.properties.dtype.itemsize
            if min(whole.sizes, default=0) < 0 or most >= 1 << 63:
                raise ValueError(f"{key!r} has the size {list(whole.sizes)}, which no tensor has")
            self.tensors[key] = TensorInfo(value.properties.dtype, whole.sizes)
            self._pieces[key] = []
            for chunk in value.chunks:
                info = where.get((key, tuple(chunk.offsets)))
                if info is None:
                    raise UserError(f"{self.folder / INDEX}: a piece of {key!r} is placed in no file; {_AGAIN}")
                box = Box(tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes)))
                if not box.inside(whole):
                    raise ValueError(f"a piece of {key!r} reaches beyond the tensor")
                piece = _stored(key, box, info)
                if math.prod(box.sizes) * value.properties.dtype.itemsize > piece.length:
                    raise ValueError(f"a piece of {key!r} is larger than its bytes in {piece.file}")
                self._pieces[key].append(piece)

    def _check_files(self) -> None:
        """Every file is there and long enough."""
        need: dict[str, int] = {}
        for pieces in [*self._pieces.values(), [self._common] if self._common else []]:
            for piece in pieces:
                need[piece.file] = max(need.get(piece.file, 0), piece.offset + piece.length)
        for name, size in sorted(need.items()):
            file = self.folder / name
            if not file.is_file():
                raise UserError(f"{file}: missing, but listed in {INDEX}; {_AGAIN}")
            have = file.stat().st_size
            if have < size:
                raise UserError(f"{file}: truncated: {have:,} bytes of at least {size:,}; {_AGAIN}")

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(sorted({piece.file for pieces in self._pieces.values() for piece in pieces}))

    def pieces(self, key: str) -> Sequence[Stored]:
        """The pieces of a tensor.

        Raises:
            UserError: no such tensor.
        """
        if key not in self._pieces:
            raise UserError(f"{self.folder}: the tensor {key!r} is missing from the checkpoint")
        return self._pieces[key]

    def read(self, key: str, box: Box) -> torch.Tensor:
        """A block of a tensor, in the dtype it is stored in; not to be written to: the last piece read is kept for its
        neighbours.

        Raises:
            UserError: damaged, or pieces that do not cover the block.
        """
        pieces = self.pieces(key)
        exact = next((piece for piece in pieces if piece.box == box), None)
        if exact is not None:
            return self._piece(exact)
        met = [(piece, piece.box, piece.box.meet(box)) for piece in pieces if piece.box is not None]
        parts = [(piece, outer, shared) for piece, outer, shared in met if shared is not None]
        # Before anything of the size that the index says is allocated.
        if sum(math.prod(shared.sizes) for _, _, shared in parts) != math.prod(box.sizes):
            raise UserError(f"{self.folder / INDEX}: the pieces of {key!r} do not cover the tensor once; {_AGAIN}")
        out = torch.empty(box.sizes, dtype=self.tensors[key].dtype)
        for piece, outer, shared in parts:
            out[shared.within(box)] = self._piece(piece)[shared.within(outer)]
        return out

    def _piece(self, piece: Stored) -> torch.Tensor:
        if self._cached[0] == piece:
            return self._cached[1]
        self._cached = (None, torch.empty(0))  # freed before the next is read
        file = self.folder / piece.file
        assert piece.box is not None
        try:
            value = self._archive(piece)
        except _DAMAGE as e:
            raise _damaged(file, f"cannot read {piece.key!r}: {first_line(e)}") from e
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != piece.box.sizes:
            raise _damaged(file, f"{piece.key!r} is not the tensor that {INDEX} describes")
        self._cached = (piece, value.detach())
        return self._cached[1]

    def _archive(self, piece: Stored) -> Any:
        with (self.folder / piece.file).open("rb") as f:
            window: Any = _Window(f, piece.offset, piece.length)
            return torch.load(window, **_PLAIN)

    def common(self) -> dict[str, Any]:
        """What the ranks saved once: steps, layout, the optimizer's settings.

        Raises:
            UserError: damaged.
        """
        file = self.folder / (self._common.file if self._common else COMMON)
        try:
            tree = self._archive(self._common)[0] if self._common else torch.load(file, **_PLAIN, mmap=True)
        except FileNotFoundError as e:
            raise UserError(f"{file}: missing; {_AGAIN}") from e
        except _DAMAGE as e:
            raise _damaged(file, first_line(e)) from e
        if not isinstance(tree, dict):
            raise _damaged(file, "not a dictionary")
        return tree


def _stored(key: str, box: Box | None, info: Any) -> Stored:
    """As an index has it; a damaged one raises whatever of `_DAMAGE`."""
    file, offset, length = str(info.relative_path), int(info.offset), int(info.length)
    if Path(file).name != file or offset < 0 or length < 0:
        raise ValueError(f"a piece of {key!r} lies outside the folder")
    return Stored(key, box, file, offset, length)


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of their own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._length - self._at))]
        self._file.seek(self._start + self._at)
        n = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += n
        return n


def is_torch_dist(folder: Path) -> bool:
    """Whether `folder` holds a distributed checkpoint."""
    return (folder / FORMAT).is_file() and (folder / INDEX).is_file()


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file}: damaged: {why}; {_AGAIN}")


def _check_format(folder: Path) -> None:
    file = folder / FORMAT
    try:
        kind = json.loads(file.read_text())["sharded_backend"]
    except FileNotFoundError as e:
        raise UserError(f"{folder}: not a Megatron-Core checkpoint (no {FORMAT})") from e
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise _damaged(file, "not the format of a Megatron-Core checkpoint") from e
    if kind != "torch_dist":
        raise UserError(f"{file}: sharded_backend = {kind!r} is not supported (only 'torch_dist')")


class _IndexUnpickler(pickle.Unpickler):
    """Makes what an index is made of, and nothing that could run code."""

    _NAMES: Mapping[str, frozenset[str]] = {
        "torch.distributed.checkpoint.metadata": frozenset(
            {
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            }
        ),
        "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
        # Megatron-Core keeps the plan of the save.
        "torch.distributed.checkpoint.planner": frozenset(
            {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
        ),
        "torch": frozenset({"Size", "device"}),
        "torch.serialization": frozenset({"_get_layout"}),
        "torch._utils": frozenset({"_get_layout"}),
        "collections": frozenset({"OrderedDict", "defaultdict"}),
        "builtins": frozenset({"dict", "list", "set"}),
        "pathlib": frozenset({"Path", "PosixPath"}),
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(torch.__dict__.get(name), torch.dtype | torch.layout)
        if not dtype and name not in self._NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index")
        return super().find_class(module, name)


def _read_index(file: Path) -> Metadata:
    try:
        with file.open("rb") as f:
            index = _IndexUnpickler(f).load()
    except FileNotFoundError as e:
        raise UserError(f"{file}: missing; {_AGAIN}") from e
    except _DAMAGE as e:
        raise _damaged(file, first_line(e)) from e
    if not isinstance(index, Metadata):
        raise _damaged(file, "not an index of torch.distributed.checkpoint")
    return index


def save_object(value: Any, stream: Any) -> None:
    """One archive, as the `*.distcp` files hold them."""
    torch.save(value, stream)


def write_index(folder: Path, tensors: Iterable[tuple[str, TensorInfo]], stored: Iterable[Stored]) -> None:
    """Write `.metadata`, `common.pt` and `metadata.json` for pieces that lie in the folder's files already.

    What Megatron-Core reads last, `metadata.json`, is written last.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    objects: dict[str, BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for piece in stored:
        where = _StorageInfo(piece.file, piece.offset, piece.length)
        if piece.box is None:
            objects[piece.key] = BytesStorageMetadata()
            storage[MetadataIndex(piece.key)] = where
        else:
            offsets, sizes = torch.Size(piece.box.offsets), torch.Size(piece.box.sizes)
            chunks.setdefault(piece.key, []).append(ChunkStorageMetadata(offsets, sizes))
            storage[MetadataIndex(piece.key, offsets)] = where
    whole: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks[key])
        for key, info in tensors
    }
    with (folder / INDEX).open("wb") as f:
        pickle.dump(Metadata(state_dict_metadata=whole | objects, storage_data=storage), f)
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    format_ = {"sharded_backend": "torch_dist", "common_backend": "torch"} | versions
    (folder / FORMAT).write_text(json.dumps(format_))


def cut(box: Box, bytes_an_element: int, limit: int) -> Iterator[Box]:
    """The block in slabs along its first dimension longer than 1, each of at most `limit` bytes where it can be."""
    axis = next((i for i, n in enumerate(box.sizes) if n > 1), None)
    if axis is None:
        yield box
        return
    row = math.prod(box.sizes) // box.sizes[axis] * bytes_an_element
    step = max(1, limit // row)
    for start in range(0, box.sizes[axis], step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[axis] += start
        sizes[axis] = min(step, box.sizes[axis] - start)
        yield Box(tuple(offsets), tuple(sizes))
