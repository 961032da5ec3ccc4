"""A process's record of what it did and when."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

from stare_megatron.types.report import Activity

_SHORTEST_S = 0.001  # what is shorter is not worth a line
_MOST = 20_000  # of one process and step; the oldest go


class ActivityLog:
    """What was done since it was last emptied. Activities may overlap."""

    def __init__(self) -> None:
        self._done: collections.deque[Activity] = collections.deque(maxlen=_MOST)

    @contextlib.contextmanager
    def during(self, name: str, detail: str = "") -> Iterator[None]:
        """Record what happens within, also when it ends in an error."""
        start, began = time.time(), time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            if seconds >= _SHORTEST_S:
                self._done.append(Activity(name, start, seconds, detail))

    def take(self) -> tuple[Activity, ...]:
        """All of it, in the order of the ends; the log is empty then."""
        done = tuple(self._done)
        self._done.clear()
        return done


def busy_seconds(activities: tuple[Activity, ...]) -> float:
    """Time in which at least one of one process's activities went on."""
    total, until = 0.0, 0.0
    for a in sorted(activities, key=lambda a: a.start):
        total += max(0.0, a.end - max(a.start, until))
        until = max(until, a.end)
    return total
