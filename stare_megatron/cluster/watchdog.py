"""How long actors may be silent before a run is taken to hang."""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
from collections.abc import Iterator

from stare_megatron.config.watchdog import WatchdogConfig

_ENOUGH = 3  # times a phase was seen, from which on its past says what to expect
_REMEMBERED = 50
_BEYOND_LONGEST = 3.0  # the longest silence seen may be far above the median: answers of very different lengths

BETWEEN = "between phases"


class Watchdog:
    """Limits of silences: times without an answer from any of the actors that are waited for. `config`: with `first`
    settled.

    A limit is `factor` times the median of the longest silences in earlier phases of the same name in which the same
    was waited for, at least `floor` and three times the longest of all; `first` until there are three; `limit` at most.
    """

    def __init__(self, config: WatchdogConfig) -> None:
        self._config = config
        self._seen: dict[tuple[str, str], collections.deque[float]] = {}
        self._longest: dict[str, float] = {}
        self.phase = BETWEEN

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase of a step. What is silent in it counts as seen when it has ended well."""
        self._settle()
        before, self.phase = self.phase, phase
        try:
            yield
            self._settle()
        finally:
            self._longest.clear()
            self.phase = before

    def answered(self, what: str, silence: float) -> None:
        """An answer came after so many seconds. `what`: the actors were doing."""
        self._longest[what] = max(silence, self._longest.get(what, 0.0))
        if self.phase == BETWEEN:
            self._settle()

    def limit(self, what: str) -> float:
        """Seconds of silence in the present phase that are a hang; infinite where none are."""
        config = self._config
        hard = config.limit or math.inf
        if not config.factor:
            return hard
        seen = self._seen.get((self.phase, what), ())
        if len(seen) < _ENOUGH:
            return min(config.first, hard)
        usual = max(config.factor * statistics.median(seen), _BEYOND_LONGEST * max(seen))
        return min(max(config.floor, usual), hard)

    def _settle(self) -> None:
        for what, silence in self._longest.copy().items():  # another thread may wait for engines
            self._seen.setdefault((self.phase, what), collections.deque(maxlen=_REMEMBERED)).append(silence)
        self._longest.clear()
