"""Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed, beside Ray: while a run starts and while it ends. What they
do between the two: `run.stop`."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

ENDS = (signal.SIGTERM, signal.SIGHUP)
ALL = (signal.SIGINT, *ENDS)

# Who sends a signal to a process group and to each process in it, or passes on one that the group gets, says it twice.
ECHO_SECONDS = 1.0

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started within, and theirs, hear no SIGTERM or SIGHUP. Schedulers send them to every process of a job,
    and a run can save only while Ray, ranks and engines live. Ray does the same about Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handling(numbers: Sequence[signal.Signals]) -> Iterator[Callable[[Handler], None]]:
    """Within this context, from the call of what it gives, a handler of ours has these signals, but for a SIGHUP that
    nobody hears, as under nohup; at its end the handlers of before are back, whoever has put others in place. Outside
    of the main thread, where Python delivers no signal, nothing is done."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}

    def install(handler: Handler) -> None:
        for number, old in before.items():
            if not (number == signal.SIGHUP and old is signal.SIG_IGN):
                signal.signal(number, handler)

    try:
        yield install
    finally:
        for number, old in before.items():
            if old is not None:  # None: of another library, written in C
                signal.signal(number, old)


class Interrupt:
    """A handler that does what Ctrl-C does. Ray puts one of its own in place when it starts, which answers SIGTERM with
    a stack trace and `abort()`: nobody would clean up. So this one is installed again after that."""

    def __init__(self) -> None:
        self._heard_at = float("-inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        before, self._heard_at = self._heard_at, time.monotonic()
        if self._heard_at - before >= ECHO_SECONDS:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end what is within as Ctrl-C does, until other handlers are put in place: what it has begun
    is cleaned up, and the command ends with one line."""
    with handling(ALL) as install:
        install(Interrupt())
        yield


@contextlib.contextmanager
def undisturbed(say: Callable[[str], None], ending: str) -> Iterator[contextlib.ExitStack]:
    """A stack of what is to be ended on leaving. No signal interrupts that, which takes seconds and would leave
    processes behind. `ending`: what `say` tells the user then, and again upon a signal."""
    with handling(ALL) as install, contextlib.ExitStack() as stack:
        try:
            yield stack
        finally:
            install(lambda number, frame: say(f"{ending}; a moment"))
            say(ending)
