"""Checksums of a folder's files, kept beside them in `manifest.json`, so that damage is found before it is loaded.

XXH3 (128 bit) guards against faults of disks, copies and interrupted writes, not against an adversary. It hashes faster
than disks read. A folder without a manifest is no error: `read` returns None.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import xxhash

from stare_megatron.errors import UserError
from stare_megatron.host.files import write_atomic

NAME = "manifest.json"
ALGORITHM = "xxh3_128"
_BLOCK = 4 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file: its size in bytes and its checksum, hexadecimal."""

    bytes: int
    checksum: str


class HashingWriter:
    """A binary stream that hashes what passes through it, so that a manifest needs no second read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._stream.write(view)
        self._bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def entry(self) -> FileEntry:
        return FileEntry(self._bytes, self._hash.hexdigest())


def checksum(file: Path, progress: Callable[[int], object] = int) -> FileEntry:
    """Read a file once. `progress` is told the bytes of each block.

    Raises:
        OSError: it cannot be read.
    """
    state, total = xxhash.xxh3_128(), 0
    with file.open("rb", buffering=0) as f:
        buffer = memoryview(bytearray(_BLOCK))
        while n := f.readinto(buffer):
            state.update(buffer[:n])
            total += n
            progress(n)
    return FileEntry(total, state.hexdigest())


def files(folder: Path) -> list[str]:
    """Every file under `folder` but the manifest, as paths relative to it, sorted."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(name for p in found if (name := p.relative_to(folder).as_posix()) != NAME)


def write(folder: Path, known: Mapping[str, FileEntry] | None = None, threads: int = 2) -> dict[str, FileEntry]:
    """Write the manifest of every file under `folder`, atomically; an older one is replaced.

    `known`: entries of files hashed while they were written, by relative path; the others are read here.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    entries = dict(known or {})
    rest = [name for name in files(folder) if name not in entries]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        entries |= zip(rest, pool.map(checksum, [folder / name for name in rest]), strict=True)
    tree = {"algorithm": ALGORITHM, "files": {name: asdict(entries[name]) for name in sorted(entries)}}
    write_atomic(folder / NAME, json.dumps(tree, indent=1))
    return entries


def unseen(folder: Path, entries: Mapping[str, FileEntry]) -> list[str]:
    """Those of `entries` that `folder` does not have in their size. Links are not followed: they may lead to what
    another node has.

    Raises:
        OSError: the folder, or one of its own, cannot be listed.
    """
    for parent in {(folder / name).parent for name in entries}:
        os.listdir(parent)  # network file systems look again at a folder that is opened
    return [name for name, entry in entries.items() if not _has(folder / name, entry.bytes)]


def _has(file: Path, size: int) -> bool:
    try:
        found = file.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(found.st_mode) or found.st_size == size


def read(folder: Path) -> dict[str, FileEntry] | None:
    """Entries by relative path; None where the folder has no manifest.

    Raises:
        UserError: a manifest that cannot be understood.
    """
    file = folder / NAME
    try:
        tree = json.loads(file.read_text())
        if tree["algorithm"] != ALGORITHM:
            raise UserError(f"{file}: algorithm {tree['algorithm']!r} is unknown (only {ALGORITHM}); remove the file")
        return {name: FileEntry(int(e["bytes"]), str(e["checksum"])) for name, e in tree["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{file}: damaged: not a manifest ({e}); copy the folder again") from e


def verify(folder: Path, *, contents: bool = True, threads: int = 2, progress: Callable[[int], object] = int) -> bool:
    """`compare` with all that the manifest names. False where there is none; files it does not name are not looked at.

    Raises:
        UserError: a file is missing, of another size, or of another content; the message names the first.
    """
    entries = read(folder)
    if entries is None:
        return False
    compare(folder, entries, contents=contents, threads=threads, progress=progress)
    return True


def compare(
    folder: Path,
    entries: Mapping[str, FileEntry],
    *,
    contents: bool,
    threads: int = 2,
    progress: Callable[[int], object] = int,
) -> None:
    """Compare files of `folder` with their entries, by relative path.

    `contents`: also the checksums, which reads every byte; without it, presence and sizes.

    Raises:
        UserError: a file is missing, of another size, or of another content; the message names the first.
    """
    for name, entry in entries.items():
        file = folder / name
        try:
            size = file.stat().st_size
        except OSError as e:
            raise UserError(f"{file}: missing, but listed in {NAME}; copy or convert the checkpoint again") from e
        if size != entry.bytes:
            what = "truncated" if size < entry.bytes else "changed"
            raise UserError(
                f"{file}: {what}: {size:,} bytes, {entry.bytes:,} when it was written; copy or convert it again"
            )
    if not contents:
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: checksum(folder / name, progress), entries)
        for (name, entry), now in zip(entries.items(), found, strict=True):
            if now != entry:
                raise UserError(
                    f"{folder / name}: damaged: checksum {now.checksum}, {entry.checksum} when it was written; copy "
                    f"or convert it again"
                )
