"""Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from stare_megatron.host.signals import ECHO_SECONDS, ENDS, handling


class StopSignal:
    """The first Ctrl-C, SIGTERM or SIGHUP asks for an end after the current step, a second one ends at once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self.asked = False
        self._asked_at = 0.0
        self._then: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals within the context, as `handling` does. Enter it after Ray has started, which puts a
        handler of its own in place."""
        with handling((signal.SIGINT, *ENDS)) as install:
            install(self._handle)
            yield

    @contextlib.contextmanager
    def calling(self, then: Callable[[], None]) -> Iterator[None]:
        """Call `then` when an end is asked for within the context, or was before."""
        self._then.append(then)
        try:
            if self.asked:
                then()
            yield
        finally:
            self._then.remove(then)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._asked_at < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self.asked, self._asked_at = True, time.monotonic()
        self._note("stopping after this step; once more to stop at once")
        for then in self._then:
            then()
