"""What was sampled, or ordered, ahead of a checkpoint: `ahead.npz`.

A run that samples while it trains has a batch in hand when it saves, drawn by the policy before the saved one. It is
kept rather than drawn again: that would take the older policy's weights too, and engines repeat samples bit for bit
only where their kernels do not depend on what else is in a batch, which those of GPUs do.

Where groups are sampled all the time, those that are in no batch yet are kept as requests: they are sampled again, so
that every prompt is learned from once.

The file has every array of what is kept (`0`, `1`, ...) and, in `tree`, the rest as JSON with arrays by number.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import types
import typing
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import UserError
from stare_megatron.types import Group, GroupRequest, GroupSummary, Measured

FILE = "ahead.npz"
_TREE = "tree"


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A whole update batch that nobody has learned from.

    `groups` with the summary of each; `sampled`: of all groups sampled for it; `measured` of them; `seconds` that it
    took; `after`: where the prompts stand after it.
    """

    groups: tuple[Group, ...]
    summaries: tuple[GroupSummary, ...]
    sampled: tuple[GroupSummary, ...]
    measured: tuple[Measured, ...]
    seconds: float
    after: StreamState


@dataclasses.dataclass(frozen=True)
class Outstanding:
    """Requests of groups that nobody has learned from, in the order they were made; `after`: where the prompts stand
    after them."""

    requests: tuple[GroupRequest, ...]
    after: StreamState


_KINDS = {kind.__name__: kind for kind in (Ahead, Outstanding)}


def write(folder: Path, kept: Ahead | Outstanding) -> None:
    """Write `ahead.npz`; it is on disk on return.

    Raises:
        OSError: it cannot be written.
    """
    arrays: list[npt.NDArray[Any]] = []
    tree = np.frombuffer(json.dumps([type(kept).__name__, _plain(kept, arrays)]).encode(), np.uint8)
    named: dict[str, Any] = {str(i): array for i, array in enumerate(arrays)} | {_TREE: tree}
    with (folder / FILE).open("wb") as file:
        np.savez(file, **named)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Ahead | Outstanding | None:
    """What a checkpoint folder keeps, bit for bit; None where nothing was sampled ahead.

    Raises:
        UserError: the file is damaged or of another version.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        kind, tree = json.loads(arrays.pop(_TREE).tobytes())
        return _typed(_KINDS[kind], tree, arrays)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, RecursionError) as e:
        raise UserError(f"{file}: not what a checkpoint keeps: {type(e).__name__}: {e}") from e


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
