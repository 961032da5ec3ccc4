"""Which engine samples which group."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from stare_megatron.cluster import runtime
from stare_megatron.cluster.fleet import State
from stare_megatron.cluster.keeper import Keeper
from stare_megatron.errors import EngineLostError, GivenUpError
from stare_megatron.types import GroupRequest, GroupSummary

_GLANCE_S = 1.0


@dataclass(frozen=True)
class _Flight:
    """A request that an engine's actor serves."""

    request: GroupRequest
    group: ray.ObjectRef
    engine: int
    actor: Any


class Dispatch:
    """Hands requests to healthy engines, in their order, and those of an engine that is lost to others, with the same
    seeds. All samples of a group share an engine, hence the prefix cache of their prompt.

    One thread takes results; others may submit meanwhile. `in_flight`: sequences that an engine is given at most,
    unless it has none.
    """

    def __init__(self, keeper: Keeper, crew: runtime.Crew, in_flight: int) -> None:
        self._keeper = keeper
        self._crew = crew
        self._in_flight = in_flight
        self._waiting: collections.deque[GroupRequest] = collections.deque()
        self._flying: dict[ray.ObjectRef, _Flight] = {}
        self._load = [0] * len(keeper.actors)
        self._again = 0
        self._lock = threading.Lock()
        self._given_up = threading.Event()

    def submit(self, requests: Iterable[GroupRequest]) -> None:
        """Sample these too, after those that wait already."""
        with self._lock:
            self._waiting.extend(requests)
            self._send()

    def results(
        self, renew: Callable[[Sequence[int]], None], beside: Callable[[], None]
    ) -> Iterator[tuple[GroupRequest, ray.ObjectRef, GroupSummary]]:
        """Every submitted request in the order of completion, also what is submitted meanwhile.

        Args:
            renew: gives engines that have come back the weights that the others have.
            beside: called every second; may raise.

        Raises:
            EngineLostError: fewer engines than the run wants are left. GivenUpError: `give_up` was called.
        """
        while self._waiting or self._flying:
            self._keeper.require()
            if stale := self._keeper.fleet.those(State.STALE):
                renew(stale)
            with self._lock:
                self._send()
            done = self._first(beside)
            if done is None:
                continue
            summary = self._landed(done)
            if summary is not None:
                yield summary

    def give_up(self) -> None:
        """End `results` within a second, with a GivenUpError; from another thread. Nothing can be sampled until
        `forget`."""
        self._given_up.set()

    def forget(self) -> None:
        """Drop what is waited for; nobody takes results."""
        with self._lock:
            for ref in self._flying:
                ray.cancel(ref)
            self._waiting.clear()
            self._flying.clear()
            self._load = [0] * len(self._load)
        self._given_up.clear()

    def _landed(self, done: ray.ObjectRef) -> tuple[GroupRequest, ray.ObjectRef, GroupSummary] | None:
        """A result; None when its engine was lost, and it is sampled again."""
        with self._lock:
            flight = self._flying.pop(done)
            self._load[flight.engine] -= flight.request.group_size
            try:
                summary = runtime.get(done, self._crew.names[flight.engine], EngineLostError)
            except EngineLostError as e:
                self._keeper.lost(flight.engine, flight.actor, e)
                self._waiting.appendleft(flight.request)
                self._again += 1
                return None
            self._send()
            return flight.request, flight.group, summary

    def take_again(self) -> int:
        """Groups that were sampled again since this was last asked."""
        again, self._again = self._again, 0
        return again

    def _first(self, beside: Callable[[], None]) -> ray.ObjectRef | None:
        """The next result; None when something about the engines has changed, or is to be."""

        def changed() -> bool:
            if self._given_up.is_set():
                raise GivenUpError("given up (sample)")
            beside()
            return self._keeper.tick() or bool(self._keeper.fleet.those(State.STALE))

        if flying := {ref: f.engine for ref, f in self._flying.copy().items()}:
            return self._crew.first(flying, "sample", changed)
        time.sleep(_GLANCE_S)
        changed()
        return None

    def _send(self) -> None:
        """Requests go out as far as there is room: each to the engine with the fewest unfinished sequences."""
        healthy = self._keeper.fleet.those(State.HEALTHY)
        while self._waiting and healthy:
            engine = min(healthy, key=self._load.__getitem__)
            size = self._waiting[0].group_size
            if self._load[engine] and self._load[engine] + size > self._in_flight:
                return
            request, actor = self._waiting.popleft(), self._keeper.actors[engine]
            group, summary = actor.run_group.remote(request)
            self._flying[summary] = _Flight(request, group, engine, actor)
            self._load[engine] += size
