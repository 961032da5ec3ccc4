"""Output that outlives who reads it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any

_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


class _Lasting(io.FileIO):
    """What is written goes nowhere once nobody reads it any more. Writes all of it, as io.BufferedWriter does, which
    must not be between this and the text: a signal's handler that prints while it writes would find it locked."""

    def write(self, data: Any, /) -> int:
        left = memoryview(data)
        while left:
            try:
                done = super().write(left)
            except OSError as e:
                if e.errno not in _GONE:
                    raise
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self.fileno())
                break
            if done is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            left = left[done:]
        return len(memoryview(data))


def outlive_readers() -> None:
    """From now on what this process prints need not be read: the terminal may be closed, and the `tee` behind a pipe
    ends at the same Ctrl-C after which a run still has to end its step, and says so."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: Any) -> Any:
    """`stream`, if it is no file of the system."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = stream.buffer.raw if isinstance(stream.buffer, io.BufferedWriter) else stream.buffer
    if not isinstance(raw, io.FileIO):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        _Lasting(raw.fileno(), "wb", closefd=False),  # as Python's own with -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
