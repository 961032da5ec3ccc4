"""Whether all of some actors are still there: trainer ranks, none of which is of use without the others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions

from stare_megatron.cluster import families, runtime

_PERIOD_S = 5.0
_CAUSE_S = 10.0  # Ray hears of a death a little later than who talked to the dead


class RollCall:
    """Actors with a method `hello`, by the names and under the error of their `crew`. `limit`: seconds of silence."""

    def __init__(self, actors: Sequence[Any], crew: runtime.Crew, limit: float) -> None:
        self._actors = actors
        self._crew = crew
        self._limit = limit
        self._busy = 0
        self._looks: dict[ray.ObjectRef, int] = {}
        self._stopped: dict[int, float] = {}
        self._ask()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Within, they have something to do and need not answer."""
        self._busy += 1
        self._stopped = {}
        try:
            yield
        finally:
            self._busy -= 1
            self._ask()

    def check(self) -> None:
        """Call it every few seconds while they have nothing to do; it returns at once.

        Raises:
            LostError, of the crew's kind: one is gone, or silent for too long; names it.
        """
        if self._busy:
            return
        asked = self._asked
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        for ref in done:
            runtime.get(ref, self._crew.names[asked[ref]], self._crew.lost)
        now = time.monotonic()
        self._silence += min(now - self._checked, _PERIOD_S) if late else 0.0
        self._checked = now
        if self._silence > self._limit:
            names = ", ".join(self._crew.names[asked[ref]] for ref in late)
            raise self._crew.lost(f"{names}: no answer for {self._silence:.0f} s (inference.answer_timeout)")
        if not late and now - self._began > _PERIOD_S:
            self._ask()

    def look(self) -> None:
        """Whether one is stopped, while they do something that takes long; call it every few seconds.

        Raises:
            LostError, of the crew's kind: one is, for as long as it may be silent.
        """
        now = time.monotonic()
        for ref in ray.wait(list(self._looks), num_returns=len(self._looks), timeout=0)[0] if self._looks else ():
            i = self._looks.pop(ref)
            number = _found(ref)
            if not number:
                self._stopped.pop(i, None)
            elif now - self._stopped.setdefault(i, now) > self._limit:
                why = f"its process {number} is stopped (inference.answer_timeout)"
                raise self._crew.lost(f"{self._crew.names[i]}: {why}")
        if not self._looks:
            met = [(i, there.family) for i, there in enumerate(self._crew.stations) if there]
            self._looks = {families.stopped(family): i for i, family in met}

    def name_the_dead(self) -> None:
        """Raises: LostError, of the crew's kind: one is gone. Takes seconds if none is."""
        asked = {actor.hello.remote(): i for i, actor in enumerate(self._actors)}
        until = time.monotonic() + _CAUSE_S
        while asked and time.monotonic() < until:
            for ref in ray.wait(list(asked), num_returns=1, timeout=1.0)[0]:
                runtime.get(ref, self._crew.names[asked.pop(ref)], self._crew.lost)

    def _ask(self) -> None:
        self._asked = {actor.hello.remote(): i for i, actor in enumerate(self._actors)}
        self._began = self._checked = time.monotonic()
        self._silence = 0.0


def _found(ref: ray.ObjectRef) -> int:
    """0 where nobody could look: the node is gone, and Ray says so of the actors."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayError:
        return 0
