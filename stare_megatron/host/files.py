"""Files and folders that are replaced whole, the room they have, and files that are not what their name says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError

PARTIAL = ".partial"
STALE = ".stale" + PARTIAL
_BLOCK = 1 << 16

# What a file begins with that is something else than its name says.
_DISGUISES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 or UTF-32 text; save it as UTF-8"),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"PK\x03\x04", b"7z\xbc\xaf"), "compressed; unpack it"),
    ((b"<!doctype", b"<html", b"<?xml"), "a web page, perhaps of a failed download; fetch the file again"),
)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content, in UTF-8: a reader, also after a crash, sees the old or the new one, never a part.

    Half of a surrogate pair, which is no character, is written as `?`.

    Raises:
        OSError: with the file's name; nothing is left of the new content.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with named(path), partial.open("w", encoding="utf-8", errors="replace") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError of a write, as of a full disk, gets the file's name, which Python gives to those of `open` alone."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a file of lines, whole or not at all. What a killed writer was cut off in is taken away first.

    Raises:
        OSError: with the file's name.
    """
    with named(path), path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        write_at(file, end, f"{line}\n".encode())


def write_at(file: io.FileIO, place: int, data: bytes, before: bytes = b"") -> None:
    """Write `data` from `place` to the end of the file, or leave `before` there, the bytes that were, if there is no
    room.

    Raises:
        OSError: as the write.
    """
    file.seek(place)
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        file.seek(place)
        file.write(before)  # into room that it had
        file.truncate(place + len(before))
        raise


def _end_of_lines(file: io.FileIO) -> int:
    """Where the last line that is whole ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` when the block ends, in place of what is there; after an error `path`
    is as it was.

    Raises:
        OSError: it cannot be made or renamed.
    """
    partial, stale = (path.with_name(path.name + ending) for ending in (PARTIAL, STALE))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        take_place(partial, path)
    finally:
        for left in (partial, stale):
            shutil.rmtree(left, ignore_errors=True)


def take_place(folder: Path, path: Path) -> Path:
    """Give a folder the name `path`, in place of what is there; after an error `path` is as it was. Returns where the
    old one lies then, if there was one, to be removed.

    Raises:
        OSError: it cannot be renamed.
    """
    stale = path.with_name(path.name + STALE)
    shutil.rmtree(stale, ignore_errors=True)
    try:
        if path.exists():
            os.rename(path, stale)
        os.rename(folder, path)
    finally:
        if stale.exists() and not path.exists():  # the second rename failed
            os.rename(stale, path)
    return stale


def sync_folder(folder: Path) -> None:
    """Names of a folder are on disk only after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(path: Path) -> int:
    """Free space of the disk that `path`, which need not exist yet, is or will be on."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def disguise(path: Path) -> str:
    """What a file is instead of what its name says, and the cure; "" where its first bytes do not tell.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as f:
        head = f.read(32).lstrip()
    return next((what for signs, what in _DISGUISES if head.startswith(signs) or head.lower().startswith(signs)), "")


def read_object(path: Path, cure: str = "") -> dict[str, Any]:
    """The JSON object that a file holds. `cure`: the end of the message where there is no such file.

    Raises:
        UserError: it cannot be read, is a Git LFS pointer or the like, or holds no JSON object.
    """
    try:
        if what := disguise(path):
            raise UserError(f"{path}: {what}")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot read it: {e.strerror}{cure}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: damaged: not UTF-8 text") from e
    except (ValueError, RecursionError) as e:
        why = "the file is empty" if not path.stat().st_size else f"not valid JSON: {e}"
        raise UserError(f"{path}: {why}; fetch it again") from e
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return tree
