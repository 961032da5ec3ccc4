"""A process's record of what it did and when, and of what it is at."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator

from stare_megatron.types.report import Activity

_SHORTEST_S = 0.001  # what is shorter is not worth a line
_MOST = 20_000  # of one process and step; the oldest go


@dataclasses.dataclass(frozen=True)
class Open:
    """An activity that goes on, with its seconds so far, and Python's identifier of the thread that began it."""

    activity: Activity
    thread: int


class ActivityLog:
    """What was done since it was last emptied, and what goes on. Activities may overlap; any thread may ask."""

    def __init__(self) -> None:
        self._done: collections.deque[Activity] = collections.deque(maxlen=_MOST)
        self._open: dict[int, tuple[str, float, float, str, int]] = {}
        self._count = itertools.count()

    @contextlib.contextmanager
    def during(self, name: str, detail: str = "") -> Iterator[None]:
        """Record what happens within, also when it ends in an error."""
        start, began = time.time(), time.monotonic()
        key = next(self._count)
        self._open[key] = name, start, began, detail, threading.get_ident()
        try:
            yield
        finally:
            del self._open[key]
            seconds = time.monotonic() - began
            if seconds >= _SHORTEST_S:
                self._done.append(Activity(name, start, seconds, detail))

    def take(self) -> tuple[Activity, ...]:
        """All of it that has ended, in the order of the ends; the log is empty then."""
        done = tuple(self._done)
        self._done.clear()
        return done

    def open(self) -> tuple[Open, ...]:
        """What goes on, in the order of the beginnings."""
        now = time.monotonic()
        return tuple(
            Open(Activity(name, start, now - began, detail), thread)
            for name, start, began, detail, thread in list(self._open.values())
        )


def busy_seconds(activities: tuple[Activity, ...]) -> float:
    """Time in which at least one of one process's activities went on."""
    total, until = 0.0, 0.0
    for a in sorted(activities, key=lambda a: a.start):
        total += max(0.0, a.end - max(a.start, until))
        until = max(until, a.end)
    return total
