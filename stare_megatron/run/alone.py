"""One process at a time has a run: a second start would write into the files of the first, or take its folder away.

A lock of the kernel (`flock`) beside the folder, which ends with the process that has it, however it ends. Where its
machine is lost, a network file system frees it after a while (NFS: 90 s, by default), for which a start waits. One
without such locks protects nobody, and is no reason not to run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stare_megatron.errors import UserError

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
_LEASE_S = 150.0
_PAUSE_S = 1.0
_CURE = "wait for its end, or choose another run.name"


@contextlib.contextmanager
def alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """The run whose folder this is, or will be, is this process's until the block ends.

    `say` takes a line, where a start waits for the lock of a process on another machine.

    Raises:
        UserError: another process has it, or its lock cannot be written.
    """
    path = folder.with_name(f".{folder.name}.lock")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        handle = _acquired(path, say)
    except OSError as e:
        raise UserError(f"run.dir = {str(folder.parent)!r}: cannot write {path}: {e.strerror}") from e
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):  # a refused start leaves nothing
            for parent in made:
                parent.rmdir()


def _acquired(path: Path, say: Callable[[str], None]) -> int:
    """The file, locked. Raises: UserError: by another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told, until = "", time.monotonic() + _LEASE_S
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, handle)
            if not _locked(handle):
                who, elsewhere = _holder(handle)
                line = f"run.name = {path.name[1:].removesuffix('.lock')!r}: {who} is at this run in {path.parent}"
                if not elsewhere or time.monotonic() >= until:
                    raise UserError(f"{line}; {_CURE}")
                if line != told:
                    say(f"{line}; waiting {_LEASE_S:.0f} s, in which a lost machine's lock goes")
                told = line
            elif _is(handle, path):  # who had it has not removed it meanwhile
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                undo.pop_all()
                return handle
            else:
                continue
        time.sleep(_PAUSE_S)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in _TAKEN:
            return False
        if e.errno not in _NO_LOCKS:
            raise
    return True


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> tuple[str, bool]:
    """Who has the lock, and whether on another machine."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        pid, host = found["pid"], found["host"]
    except (ValueError, KeyError, TypeError):  # it is about to write it
        return "another process", False
    return f"process {pid} on {host}", host != socket.gethostname()
