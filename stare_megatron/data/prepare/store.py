"""The files of a preparation: `OUT`, `OUT.removed.jsonl`, `OUT.malformed.jsonl`, `OUT.manifest.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import stare_megatron
from stare_megatron.data.prepare.hub import Source
from stare_megatron.data.prepare.overlap import Reference
from stare_megatron.data.prepare.read import read
from stare_megatron.data.prepare.settings import Settings
from stare_megatron.data.prepare.types import Counts, Malformed, RawRow, Recipe, Removed
from stare_megatron.errors import UserError
from stare_megatron.host.files import write_atomic


def write(
    out: Path,
    rows: Sequence[dict[str, Any]],
    removed: Sequence[Removed],
    malformed: Sequence[Malformed],
    recipe: Recipe,
    source: Source,
    settings: Settings,
    counts: Counts,
) -> None:
    """Each file whole or not at all, the manifest last: where it is, the others are complete.

    Raises:
        UserError: the folder cannot be written to.
    """
    manifest = {
        "dataset": recipe.name,
        "role": recipe.role,
        "hub": source.origin,
        "files": [_described(path) for path in source.files],
        "against": [_described(path) for path in settings.against],
        "counts": dataclasses.asdict(counts),
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "against"},
        "versions": {
            "stare_megatron": stare_megatron.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("huggingface_hub", "pyarrow")},
        },
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        companion(out, "manifest.json").unlink(missing_ok=True)
        write_atomic(out, _lines(rows))
        _replace_or_remove(companion(out, "removed.jsonl"), [dataclasses.asdict(r) for r in removed])
        _replace_or_remove(companion(out, "malformed.jsonl"), [dataclasses.asdict(m) for m in malformed])
        manifest["output"] = _described(out)
        write_atomic(companion(out, "manifest.json"), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror or e}") from e


def companion(out: Path, ending: str) -> Path:
    """The path of a file beside `out`."""
    return out.with_name(f"{out.name}.{ending}")


def read_references(path: Path) -> list[Reference]:
    """The problems of a prompt file that was prepared by us.

    Raises:
        UserError: unreadable, or rows without the columns that preparation writes.
    """
    found = []
    for row in read(path):
        if isinstance(row, Malformed):
            raise UserError(row.line())
        found.append(Reference(*(_string(row, key) for key in ("id", "source", "problem"))))
    if not found:
        raise UserError(f"{path}: no rows to keep out")
    return found


def _string(row: RawRow, key: str) -> str:
    value = row.fields.get(key)
    if not isinstance(value, str):
        raise UserError(
            f"{row.place}: no text in column {key!r}; --against takes files that were prepared by this tool"
        )
    return value


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _replace_or_remove(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """No rows, no file: an old one must not be taken for this run's."""
    if rows:
        write_atomic(path, _lines(rows))
    else:
        path.unlink(missing_ok=True)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
