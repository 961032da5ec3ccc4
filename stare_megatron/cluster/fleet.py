"""The states of a run's engines, and what makes one go from one state to another. No engine is touched here.

    STALE --holds the weights--> HEALTHY --silent--> SUSPECT --answers--> HEALTHY, or STALE
      ^                             |                   |
    started                      is lost        is lost, or silent for too long
      |                             v                   v
    RESTARTING <--its turn has come-- DEAD --no restart left--> RETIRED

Only HEALTHY engines are given groups. Times are seconds of a clock that only goes on.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from stare_megatron.config import InferenceConfig


class State(enum.Enum):
    STALE = "STALE"
    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    DEAD = "DEAD"
    RESTARTING = "RESTARTING"
    RETIRED = "RETIRED"


class Event(enum.Enum):
    """What is noticed of an engine, or done with it. ANSWERED: and it has the weights of now; OUTDATED: it is well and
    has others; SPENT: it may not be started again."""

    SILENT = "silent"
    ANSWERED = "answered"
    OUTDATED = "outdated"
    LOST = "lost"
    RESTARTED = "restarted"
    SPENT = "spent"
    STARTED = "started"
    PUSHED = "pushed"


_S, _E = State, Event
NEXT: Mapping[tuple[State, Event], State] = {
    (_S.STALE, _E.PUSHED): _S.HEALTHY,
    (_S.STALE, _E.SILENT): _S.SUSPECT,
    (_S.HEALTHY, _E.OUTDATED): _S.STALE,
    (_S.HEALTHY, _E.SILENT): _S.SUSPECT,
    (_S.SUSPECT, _E.ANSWERED): _S.HEALTHY,
    (_S.SUSPECT, _E.OUTDATED): _S.STALE,
    (_S.SUSPECT, _E.PUSHED): _S.HEALTHY,
    (_S.STALE, _E.LOST): _S.DEAD,
    (_S.HEALTHY, _E.LOST): _S.DEAD,
    (_S.SUSPECT, _E.LOST): _S.DEAD,
    (_S.RESTARTING, _E.LOST): _S.DEAD,
    (_S.RESTARTING, _E.STARTED): _S.STALE,
    (_S.DEAD, _E.RESTARTED): _S.RESTARTING,
    (_S.DEAD, _E.SPENT): _S.RETIRED,
}
"""Whatever is not here changes nothing."""

UP = frozenset({State.STALE, State.HEALTHY, State.SUSPECT})
"""Engines that are there to be called."""

SUSPECT_PART = 6
"""An engine is suspect after this part of `inference.answer_timeout`."""

FORGIVEN_S = 3600.0
"""Restarts before as long a time of health do not count any more."""


@dataclass(frozen=True)
class Change:
    """`engine` went from one state to another. `news`: more than the first weights that it gets."""

    engine: int
    old: State
    new: State
    reason: str
    news: bool = True


@dataclass
class _Engine:
    """`version`: of the weights that it holds; None: those of its checkpoint folder."""

    state: State = State.STALE
    version: int | None = None
    restarts: int = 0
    well_since: float = 0.0
    due: float = 0.0
    reason: str = ""


@dataclass
class Fleet:
    """The engines of a run. `pushes`: weights come from a trainer; else those of the checkpoint folder are the right
    ones. Methods return what changed."""

    config: InferenceConfig
    pushes: bool
    _engines: list[_Engine] = field(init=False)
    _version: int | None = None

    def __post_init__(self) -> None:
        begin = State.STALE if self.pushes else State.HEALTHY
        self._engines = [_Engine(begin) for _ in range(self.config.engines)]

    def state(self, engine: int) -> State:
        return self._engines[engine].state

    def those(self, *states: State) -> list[int]:
        """Engines in one of these states."""
        return [i for i, engine in enumerate(self._engines) if engine.state in states]

    def reason(self, engine: int) -> str:
        """Why it was last lost, "" if it never was."""
        return self._engines[engine].reason

    def answered(self, engine: int) -> list[Change]:
        current = self._engines[engine].version == self._version
        return self._on(engine, Event.ANSWERED if current else Event.OUTDATED, "it answers")

    def silent(self, engine: int, seconds: float, now: float, why: str) -> list[Change]:
        """It has not answered for so long. `why`: what is known of it."""
        if seconds >= self.config.answer_timeout:
            return self.lost(engine, now, f"{why} for {seconds:.0f} s (inference.answer_timeout)")
        if seconds >= self.config.answer_timeout / SUSPECT_PART:
            return self._on(engine, Event.SILENT, f"{why} for {seconds:.0f} s")
        return []

    def lost(self, engine: int, now: float, why: str) -> list[Change]:
        """It is gone, or given up. It comes back when `due` says so, unless it has used its restarts."""
        mine = self._engines[engine]
        was_well = mine.state in (State.HEALTHY, State.SUSPECT)
        changes = self._on(engine, Event.LOST, why)
        if not changes:
            return []
        mine.reason = why
        if was_well and now - mine.well_since >= FORGIVEN_S:
            mine.restarts = 0
        if mine.restarts >= self.config.restarts:
            left = self.alive - 1
            spent = f"{mine.restarts} restarts are spent (inference.restarts); {left} of {len(self._engines)} are left"
            return changes + self._on(engine, Event.SPENT, spent)
        wait = self.config.restart_backoff * 2 ** (mine.restarts - 1) if mine.restarts else 0.0
        mine.due = now + wait
        return changes

    def due(self, now: float) -> list[int]:
        """Lost engines whose turn it is to be started again."""
        return [i for i in self.those(State.DEAD) if now >= self._engines[i].due]

    def restarted(self, engine: int) -> list[Change]:
        """It is being started."""
        mine = self._engines[engine]
        mine.restarts += 1
        mine.version = None
        return self._on(engine, Event.RESTARTED, f"start {mine.restarts} of {self.config.restarts}")

    def started(self, engine: int, now: float) -> list[Change]:
        """It can be called."""
        changes = self._on(engine, Event.STARTED, "it has started, with the weights of model.path")
        return changes if self.pushes else changes + self._holds(engine, now)

    def pushed(self, engines: Collection[int], version: int, now: float) -> list[Change]:
        """These, and nobody else, got the weights of `version`."""
        self._version = version
        changes = []
        for i in self.those(*UP):
            if i in engines:
                self._engines[i].version = version
                changes += self._holds(i, now)
            elif self._engines[i].version != version:
                changes += self._on(i, Event.OUTDATED, f"the others have version {version}")
        return changes

    @property
    def alive(self) -> int:
        """Engines that work, or may come back."""
        return len(self._engines) - len(self.those(State.RETIRED))

    @property
    def too_few(self) -> str:
        """Why the run cannot go on with the engines that are left; "" if it can."""
        if self.alive >= self.config.fewest_engines:
            return ""
        gone = self.those(State.RETIRED)
        return (
            f"engine {gone[-1]}: {self.reason(gone[-1])}; {self.alive} of {len(self._engines)} engines are left, the "
            f"run wants {self.config.fewest_engines} (inference.min_engines)"
        )

    def _holds(self, engine: int, now: float) -> list[Change]:
        mine = self._engines[engine]
        weights = f"it holds version {mine.version}" if self.pushes else "it holds the weights of model.path"
        changes = self._on(engine, Event.PUSHED, weights)
        if changes:
            mine.well_since = now
        return changes

    def _on(self, engine: int, event: Event, reason: str) -> list[Change]:
        mine = self._engines[engine]
        old, mine.state = mine.state, NEXT.get((mine.state, event), mine.state)
        if mine.state is old:
            return []
        return [Change(engine, old, mine.state, reason, news=event is not Event.PUSHED or bool(mine.restarts))]
