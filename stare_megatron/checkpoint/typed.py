"""Typed values in a file, bit for bit: every array (`0`, `1`, ...) and, in `tree`, the rest as JSON with arrays by
number."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import types
import typing
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TREE = "tree"


def write(path: Path, value: Any) -> None:
    """Write a dataclass of numbers, texts, enums, arrays, tuples and dataclasses; it is on disk on return.

    Raises:
        OSError: it cannot be written.
    """
    arrays: list[npt.NDArray[Any]] = []
    tree = np.frombuffer(json.dumps([type(value).__name__, _plain(value, arrays)]).encode(), np.uint8)
    named: dict[str, Any] = {str(i): array for i, array in enumerate(arrays)} | {_TREE: tree}
    with path.open("wb") as file:
        np.savez(file, **named)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, kinds: Mapping[str, type]) -> Any:
    """What was written, of one of `kinds`, which are by their names. A field that an earlier version did not have
    takes its default.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        kind, tree = json.loads(arrays.pop(_TREE).tobytes())
        return _typed(kinds[kind], tree, arrays)
    except (EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, RecursionError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from e


def _plain(value: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    """What JSON can hold; an array goes to `arrays`, and is its number there."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(vars(value)[field.name], arrays) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return len(arrays) - 1
    if isinstance(value, tuple):
        return [_plain(part, arrays) for part in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value.item() if isinstance(value, np.generic) else value


def _typed(kind: Any, tree: Any, arrays: dict[str, npt.NDArray[Any]]) -> Any:
    """The value of type `kind` that `_plain` made `tree` of."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast("Any", kind)(**{name: _typed(hints[name], part, arrays) for name, part in tree.items()})
    if origin is np.ndarray:
        return arrays[str(tree)]
    if origin in (typing.Union, types.UnionType):
        return None if tree is None else _typed(parts[0], tree, arrays)
    if origin is tuple:
        kinds = [parts[0]] * len(tree) if parts[-1] is Ellipsis else parts
        return tuple(_typed(k, part, arrays) for k, part in zip(kinds, tree, strict=True))
    return kind(tree) if isinstance(kind, type) and issubclass(kind, enum.Enum) else tree
