"""SIGTERM, and SIGHUP of a terminal that is closed, beside Ray."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

ENDS = (signal.SIGTERM, signal.SIGHUP)

# Who sends a signal to a process group and to each process in it, or passes on one that the group gets, says it twice.
ECHO_SECONDS = 1.0


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started within, and theirs, hear no SIGTERM or SIGHUP. Schedulers send them to every process of a job,
    and a run can save only while Ray, ranks and engines live. Ray does the same about Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interrupting:
    """Within this context, from `install` on, SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does. Ray puts a
    handler of its own in place when it starts, which answers SIGTERM with a stack trace and `abort()`: nobody would
    clean up. So `install` comes after that. Outside of the main thread, where Python delivers no signal, nothing is
    done."""

    def __init__(self) -> None:
        self._heard_at = float("-inf")
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupting:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in ENDS}
        return self

    def install(self) -> None:
        for number, handler in self._before.items():
            if number == signal.SIGHUP and handler is signal.SIG_IGN:  # nohup's
                continue
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: of another library, written in C
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before, self._heard_at = self._heard_at, time.monotonic()
        if self._heard_at - before >= ECHO_SECONDS:
            raise KeyboardInterrupt
