"""Files and folders that are replaced whole, and the room they have."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content, in UTF-8: a reader, also after a crash, sees the old or the new one, never a part.

    Half of a surrogate pair, which is no character, is written as `?`.
    """
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8", errors="replace") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` when the block ends, in place of what is there; after an error `path`
    is as it was.

    Raises:
        OSError: it cannot be made or renamed.
    """
    partial, stale = (path.with_name(path.name + ending) for ending in (PARTIAL, ".stale" + PARTIAL))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(stale, ignore_errors=True)
        if path.exists():
            os.rename(path, stale)
        os.rename(partial, path)
    finally:
        if stale.exists() and not path.exists():  # the second rename failed
            os.rename(stale, path)
        for left in (partial, stale):
            shutil.rmtree(left, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Free space of the disk that `path`, which need not exist yet, is or will be on."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
