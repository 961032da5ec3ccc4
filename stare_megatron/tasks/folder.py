"""Folders made from settings: made once, whole or not at all, and reused as long as nothing in them has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError
from stare_megatron.host.files import write_atomic
from stare_megatron.tasks.base import TaskPrompt

_RECORD = "made.json"


def reuse_or_build(
    out: Path, settings: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Make `out` with `build(folder)`, or reuse it when it was made from equal settings and is intact.

    `settings` must survive JSON. What `build` returns is kept in OUT/made.json. A folder of other settings is
    replaced. Returns that record, and whether it was reused.

    Raises:
        UserError: `out` exists and was not made by this function, or cannot be written.
    """
    found = _intact(out, settings)
    if found is not None:
        return found, True
    if out.exists() and not (out / _RECORD).is_file():
        raise UserError(f"{out}: exists and was not made by this tool; name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror}") from e
    try:
        new = scratch / "new"
        new.mkdir()
        made = dict(build(new))
        record = {"settings": dict(settings), "made": made, "sha256": _checksum(new)}
        (new / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if out.exists():
            out.rename(scratch / "old")
        try:
            new.rename(out)
        except OSError:
            found = _intact(out, settings)  # another process made the same folder meanwhile
            if found is None:
                raise
            return found, True
        return made, False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_prompts(path: Path, source: str, prompts: list[TaskPrompt], *, append: bool = False) -> None:
    """One JSON object per line, under the default keys of the `[data]` table; `append`: after the file's own lines."""
    rows = [{"id": p.id, "source": source, "prompt": p.text, "answer": p.answer} for p in prompts]
    kept = path.read_text() if append and path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, kept + "".join(json.dumps(row) + "\n" for row in rows))


def _intact(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        record = json.loads((out / _RECORD).read_text())
        if record["settings"] == dict(settings) and record["sha256"] == _checksum(out):
            return record["made"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, or not a complete folder of ours: it is rebuilt
    return None


def _checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _RECORD):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
