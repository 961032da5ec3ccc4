"""One process at a time has a run: a second start would write into the files of the first, or take its folder away.

A lock of the kernel (`flock`) beside the folder, which ends with the process that has it, however it ends. A file
system without such locks protects nobody, and is no reason not to run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from stare_megatron.errors import UserError

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The run whose folder this is, or will be, is this process's until the block ends.

    Raises:
        UserError: another process has it, or its lock cannot be written.
    """
    path = folder.with_name(f".{folder.name}.lock")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        handle = _opened(path)
        while not _is(handle, path):  # who had it has removed it meanwhile
            os.close(handle)
            handle = _opened(path)
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


def _opened(path: Path) -> int:
    """The file, locked. Raises: UserError: by another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, handle)
        if not _locked(handle):
            raise UserError(_taken(path, handle))
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        undo.pop_all()
    return handle


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


def _taken(path: Path, handle: int) -> str:
    """Who has the lock, and what to do."""
    run, cure = path.name[1:].removesuffix(".lock"), "wait for its end, or choose another run.name"
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        pid, host = found["pid"], found["host"]
    except (ValueError, KeyError, TypeError):  # it is about to write it
        return f"run.name = {run!r}: another process is at this run in {path.parent}; {cure}"
    if host != socket.gethostname():
        cure += "; where that machine is gone, the file system frees its lock within minutes"
    return f"run.name = {run!r}: process {pid} on {host} is at this run in {path.parent}; {cure}"
