"""A trainer rank's files of checkpoints on its node's own disk.

The folder of such a checkpoint is shared by all nodes like any other's. Of the files that ranks write it has links,
which lead to the files on the nodes that have them, and nowhere on all others.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from stare_megatron.errors import RunError, UserError
from stare_megatron.host import manifest
from stare_megatron.host.files import free_bytes

_BLOCK = 4 << 20
_THREADS = 2  # of a rank: beside a step, and to a file system that is slower than the disk


def file_rank(name: str) -> int:
    """The rank that wrote a file of a distributed checkpoint, `.../__RANK_NUMBER.distcp`; -1 for any other file."""
    parts = Path(name).name.split("_")
    return int(parts[2]) if name.endswith(".distcp") and len(parts) == 4 and parts[2].isdigit() else -1


class NodeDisk:
    """What a rank does with its files; folders are those of whole checkpoints, with a manifest."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._copies: list[concurrent.futures.Future[None]] = []

    def room(self, home: Path) -> int:
        """Bytes on the disk that `home`, which need not exist, is or will be on."""
        return free_bytes(home)

    def tidy(self, home: Path, keep: Collection[str]) -> None:
        """Remove all folders of `home` but those of these names, and `home` when nothing is left in it."""
        # Other ranks of the node remove the same.
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(home):
                if name not in keep:
                    shutil.rmtree(home / name, ignore_errors=True)
        if not keep:
            shutil.rmtree(home, ignore_errors=True)

    def fault(self, folder: Path, contents: bool) -> str:
        """Why this rank cannot go on from a checkpoint that it wrote; "" if it can. `contents`: compare checksums."""
        try:
            manifest.compare(folder, self._own(folder), contents=contents)
        except UserError as e:
            return str(e).partition(", but listed")[0].partition("; copy")[0]
        return ""

    def begin_copy(self, folder: Path, target: Path) -> None:
        """Start to copy this rank's files to the same places in `target`, whose folders are there."""
        own = self._own(folder)
        pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="durable")
        self._copies = [pool.submit(copy, folder / name, target / name, entry) for name, entry in own.items()]
        pool.shutdown(wait=False)

    def copied(self) -> bool:
        """Whether `finish_copy` need not wait."""
        return all(one.done() for one in self._copies)

    def finish_copy(self) -> None:
        """Wait until this rank's files are copied, and on disk.

        Raises:
            RunError: one cannot be, or is not what was written.
        """
        copies, self._copies = self._copies, []
        try:
            for one in copies:
                one.result()
        except OSError as e:
            raise RunError(str(e)) from e

    def _own(self, folder: Path) -> dict[str, manifest.FileEntry]:
        entries = manifest.read(folder) or {}
        return {name: entry for name, entry in entries.items() if file_rank(name) == self._rank}


def copy(source: Path, target: Path, entry: manifest.FileEntry) -> None:
    """Copy a file whose content is known; the copy is on disk on return.

    Raises:
        OSError: it cannot be read or written, or is not what `entry` says.
    """
    buffer = memoryview(bytearray(_BLOCK))
    with source.open("rb", buffering=0) as reading, target.open("wb") as writing:
        hashed = manifest.HashingWriter(writing)
        while n := reading.readinto(buffer):
            hashed.write(buffer[:n])
        writing.flush()
        os.fsync(writing.fileno())
    if hashed.entry() != entry:
        raise OSError(errno.EIO, "damaged: not what was written", str(source))
