"""Writing a Hugging Face checkpoint: what travels along with the weights, and safetensors files tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

from stare_megatron.host import manifest
from stare_megatron.models.weights import INDEX, SINGLE

T = TypeVar("T")
# Name, dtype and full shape of one tensor.
Spec = tuple[str, torch.dtype, tuple[int, ...]]

_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth"),
    *(".gguf", ".h5", ".msgpack", ".onnx", ".partial"),
)
_FOLDERS = ("additional_chat_templates",)
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def companions(source: Path) -> list[str]:
    """Everything of a checkpoint but its weights: configuration, tokenizer, chat templates, defaults of generation,
    licence; as paths relative to it, sorted."""
    inner = [file for folder in _FOLDERS for file in (source / folder).rglob("*")]
    files = (file for file in [*source.iterdir(), *inner] if file.is_file())
    names = (file.relative_to(source).as_posix() for file in files)
    return sorted(name for name in names if not name.endswith(_WEIGHTS) and name != manifest.NAME)


def copy_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy them; config.json says `dtype` afterwards, under the key it uses.

    Raises:
        OSError: a file cannot be read or written.
    """
    for name in companions(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    config = target / "config.json"
    tree = json.loads(config.read_text())
    key = "torch_dtype" if "torch_dtype" in tree else "dtype"
    tree[key] = dtype_name(dtype)
    config.write_text(json.dumps(tree, indent=2) + "\n")


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def spec_bytes(spec: Spec) -> int:
    return math.prod(spec[2]) * spec[1].itemsize


def grouped(items: Iterable[T], bytes_of: Callable[[T], int], limit: int) -> list[list[T]]:
    """Consecutive items of at most `limit` bytes a group (or one larger item)."""
    groups: list[list[T]] = []
    size = 0
    for item in items:
        own = bytes_of(item)
        if not groups or size + own > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += own
    return groups


def files(specs: Sequence[Spec], limit: int) -> dict[str, list[Spec]]:
    """Tensors grouped into files of at most `limit` bytes, by the file's customary name."""
    groups = grouped(specs, spec_bytes, limit)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def write_index(folder: Path, content: Mapping[str, Sequence[Spec]]) -> None:
    """Write the index of several files; nothing for one.

    Raises:
        OSError: it cannot be written.
    """
    if len(content) == 1:
        return
    total = sum(spec_bytes(spec) for group in content.values() for spec in group)
    weight_map = {spec[0]: file for file, group in content.items() for spec in group}
    tree = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(tree, indent=2) + "\n")


class SafetensorsWriter:
    """One safetensors file, written front to back and hashed on the way: nothing but the rows in hand is in memory.

    The format is a length, a header in JSON and the tensors' bytes. Blocks of rows are passed in the order of `specs`.

    Raises:
        OSError: it cannot be written.
        ValueError: on leaving the context, fewer or more bytes were passed than `specs` says.
    """

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in specs:
            begin, end = end, end + spec_bytes((name, dtype, shape))
            table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._size = 8 + len(header) + end
        self._path = path
        self._file = path.open("wb")
        self._stream = manifest.HashingWriter(self._file)
        self._stream.write(len(header).to_bytes(8, "little") + header)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def write(self, rows: torch.Tensor) -> None:
        """The next rows; on any device, in the dtype that `specs` says."""
        flat = rows.detach().cpu().contiguous().flatten().view(torch.uint8)
        self._stream.write(memoryview(flat.numpy()))  # pyright: ignore[reportArgumentType]  # a buffer, as of 3.12

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._stream.tell() != self._size:
            raise ValueError(f"{self._path}: {self._stream.tell()} bytes written, {self._size} announced")

    def entry(self) -> manifest.FileEntry:
        """Size and checksum of what was written."""
        return self._stream.entry()
