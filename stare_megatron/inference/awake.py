"""A clock that stands while an engine sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable


class AwakeClock:
    """Seconds, as `time.monotonic` has them, without those between `stand` and `go`. `now`: where they are from."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._slept = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        return (self._now() if self._since is None else self._since) - self._slept

    def stand(self) -> None:
        """Harmless when repeated."""
        if self._since is None:
            self._since = self._now()

    def go(self) -> None:
        """Harmless when it goes."""
        if self._since is not None:
            self._slept += self._now() - self._since
            self._since = None
