"""Which engine samples what, and what comes first."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from stare_megatron.cluster import runtime
from stare_megatron.cluster.fleet import State
from stare_megatron.cluster.keeper import Keeper
from stare_megatron.cluster.lengths import Lengths
from stare_megatron.cluster.parts import Order, spread, whole
from stare_megatron.errors import EngineLostError, GivenUpError
from stare_megatron.types import GroupRequest, GroupSummary

_GLANCE_S = 1.0


@dataclass(frozen=True)
class Limits:
    """`sequences`: that an engine is given at most, unless it has nothing. `spread_below`: groups whose prompt has
    fewer tokens are sampled by several engines. `longest_first`: of requests that come together, those are served first
    whose responses are expected to be the longest."""

    sequences: int
    spread_below: int = 0
    longest_first: bool = False


@dataclass(frozen=True)
class _Flight:
    """An order that an engine's actor serves."""

    order: Order
    group: ray.ObjectRef
    engine: int
    actor: Any


@dataclass
class _Load:
    """What an engine has to sample: sequences, and tokens of them that its KV cache is expected to hold at their
    ends."""

    sequences: int = 0
    tokens: float = 0.0


class Dispatch:
    """Hands requests to healthy engines, and those of an engine that is lost to others, with the same seeds.

    The samples of a group share an engine, hence the prefix cache of their prompt, or, where the prompt is short, are
    spread: then no engine is left alone with all of a slow group. Seeds are by group and sample: which engine serves
    what, and when, does not change what is drawn.

    One thread takes results; others may submit meanwhile.
    """

    def __init__(self, keeper: Keeper, crew: runtime.Crew, limits: Limits) -> None:
        self._keeper = keeper
        self._crew = crew
        self._limits = limits
        self._waiting: collections.deque[Order] = collections.deque()
        self._flying: dict[ray.ObjectRef, _Flight] = {}
        self._lengths = Lengths()
        self._again = 0
        self._lock = threading.Lock()
        self._given_up = threading.Event()

    def submit(self, requests: Iterable[GroupRequest]) -> None:
        """Sample these too, after those that wait already."""
        with self._lock:
            new = list(requests)
            if self._limits.longest_first:
                new.sort(key=lambda request: -self._lengths.expected(request.prompt))
            self._waiting.extend(map(whole, new))
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
            found = self._landed(done)
            if found is not None:
                yield found

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
        self._given_up.clear()

    def _landed(self, done: ray.ObjectRef) -> tuple[GroupRequest, ray.ObjectRef, GroupSummary] | None:
        """A whole group; None when there is more to do for it: its engine was lost, or it is a part."""
        with self._lock:
            flight = self._flying.pop(done)
            order = flight.order
            try:
                summary: GroupSummary = runtime.get(done, self._crew.names[flight.engine], EngineLostError)
            except EngineLostError as e:
                self._keeper.lost(flight.engine, flight.actor, e)
                self._waiting.appendleft(order)
                self._again += not order.joins
                return None
            except ray.exceptions.ObjectLostError:
                if not order.joins:
                    raise
                self._waiting.appendleft(whole(order.request))  # its parts went with the node that had one
                self._again += 1
                return None
            if order.spread and not order.joins:
                order.spread.done[order.samples[0]] = flight.group, summary
                if len(order.spread.done) == order.spread.parts:
                    self._waiting.appendleft(Order(order.request, (), order.spread))
                self._send()
                return None
            self._lengths.saw(order.request.prompt, summary.num_action_tokens)
            self._send()
            return order.request, flight.group, summary

    def take_again(self) -> int:
        """Groups, or parts of spread ones, that were sampled again since this was last asked."""
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
        """Orders go out as far as there is room: each to the engine with the fewest tokens to sample, as far as is
        known, then with the fewest sequences."""
        healthy = self._keeper.fleet.those(State.HEALTHY)
        loads = self._loads(healthy)
        while self._waiting and healthy:
            order = self._waiting[0]
            if self._is_spread(order, len(healthy)):
                self._waiting.popleft()
                self._waiting.extendleft(reversed(spread(order, len(healthy))))
                continue
            engine = min(healthy, key=lambda i: (loads[i].tokens, loads[i].sequences))
            load = loads[engine]
            if load.sequences and load.sequences + len(order.samples) > self._limits.sequences:
                return
            self._waiting.popleft()
            self._fly(order, engine)
            self._add(load, order)

    def _is_spread(self, order: Order, engines: int) -> bool:
        """Whether an order of a whole group is to be made several."""
        short = len(order.request.prompt.token_ids) < self._limits.spread_below
        return order.spread is None and short and engines > 1 and len(order.samples) > 1

    def _fly(self, order: Order, engine: int) -> None:
        actor = self._keeper.actors[engine]
        if order.spread and order.joins:
            parts = [part for _, part in sorted(order.spread.done.items(), key=lambda item: item[0])]
            reflections = tuple(n for _, summary in parts for n in summary.reflections)
            group, summary = actor.join.remote(reflections, *[ref for ref, _ in parts])
        else:
            group, summary = actor.run_group.remote(order.request, order.samples)
        self._flying[summary] = _Flight(order, group, engine, actor)

    def _loads(self, engines: Collection[int]) -> dict[int, _Load]:
        """By what is expected now, of everything alike."""
        loads = {i: _Load() for i in engines}
        for flight in self._flying.values():
            if flight.engine in loads:
                self._add(loads[flight.engine], flight.order)
        return loads

    def _add(self, load: _Load, order: Order) -> None:
        load.sequences += len(order.samples)
        load.tokens += self._tokens(order)

    def _tokens(self, order: Order) -> float:
        """Tokens that the KV cache is expected to hold of it at its end; 0: nothing is known of its responses."""
        expected = self._lengths.expected(order.request.prompt)
        return expected and len(order.samples) * expected + len(order.request.prompt.token_ids)
