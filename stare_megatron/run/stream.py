"""Groups are sampled all the time: batches are drawn from what is finished, and weights change under the rest."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import threading
import time
from concurrent.futures import Future
from typing import Generic, TypeVar

from stare_megatron.checkpoint import Outstanding
from stare_megatron.data.prompts import PromptStream, StreamState
from stare_megatron.rollout.collect import Collected, Collector
from stare_megatron.rollout.window import Batch, Window
from stare_megatron.run.sampling import Engines, Kept
from stare_megatron.types import GroupRequest, GroupSummary

Ref = TypeVar("Ref")


class StreamSampler(Generic[Ref]):
    """Admits and draws as `window` says. A thread takes what engines finish, and orders the next at once.

    Seeds derive from the version that engines held when a group was admitted, and its number among those: without
    staleness they are those of the synchronous sampler, and so is everything else.
    """

    def __init__(self, collector: Collector[Ref], stream: PromptStream, window: Window, engines: Engines[Ref]) -> None:
        self._collector = collector
        self._stream = stream
        self._window = window
        self._engines = engines
        self._again: collections.deque[GroupRequest] = collections.deque()
        self._requests: dict[int, GroupRequest] = {}  # of groups in no batch
        self._finished: dict[int, tuple[Ref, GroupSummary]] = {}
        self._since = time.monotonic()
        self._held = True  # nothing is admitted
        self._closed = False
        self._changed = threading.Condition()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "sampling")
        self._serving = self._thread.submit(self._serve)
        self._serving.add_done_callback(self._ended)

    def restore(self, kept: Outstanding) -> None:
        """The first groups are those of a checkpoint: the same prompts and seeds, sampled anew."""
        self._again.extend(kept.requests)
        self._stream.restore(kept.after)

    def next_batch(self, version: int) -> Collected[Ref]:
        """As `Sampler`; waits until enough groups are finished that may be learned from."""
        with self._changed:
            self._held = False
            self._window.begin(version)
            self._admit()
            while (made := self._draw()) is None:
                self._changed.wait()
            return self._collected(version, made)

    @property
    def busy(self) -> bool:
        return self._serving.done()

    def settle(self) -> None:
        """Weights may change at any time."""
        self._raise()

    def drain(self) -> None:
        """Wait until nothing is being sampled; the next batch goes on."""
        with self._changed:
            self._held = True
            while self._window.running:
                self._raise()
                self._changed.wait()

    def state(self) -> StreamState:
        return self._stream.state()

    def ahead(self) -> Kept:
        with self._changed:
            kept = Outstanding(tuple(self._requests[n] for n in sorted(self._requests)), self._stream.state())
            kept = dataclasses.replace(kept, requests=(*kept.requests, *self._again))
        return lambda: kept

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._engines.give_up()
        self._thread.shutdown()

    def _draw(self) -> Batch | None:
        self._raise()
        return self._window.draw()

    def _raise(self) -> None:
        if self._serving.done():
            self._serving.result()

    def _admit(self) -> None:
        """Order as many groups as the window has room for; the lock is held."""
        new: list[GroupRequest] = []
        while not self._held and (place := self._window.admit()):
            request = self._again.popleft() if self._again else self._collector.request(place.version, place.order)
            new.append(dataclasses.replace(request, order=place.number))
            self._requests[place.number] = new[-1]
        if new:
            self._engines.submit(new)
            self._changed.notify_all()

    def _serve(self) -> None:
        while not self._closed:
            for request, ref, summary in self._engines.results():
                self._take(request.order, ref, summary)
            with self._changed:
                while not (self._closed or self._window.running):
                    self._changed.wait()

    def _ended(self, serving: Future[None]) -> None:
        """Whoever waits finds out why."""
        with self._changed:
            self._changed.notify_all()

    def _take(self, number: int, ref: Ref, summary: GroupSummary) -> None:
        with self._changed:
            self._finished[number] = ref, summary
            self._window.finish(number, useful=self._collector.useful(summary))
            self._admit()
            self._changed.notify_all()

    def _collected(self, version: int, made: Batch) -> Collected[Ref]:
        groups = [self._finished[n] for n in made.groups]
        sampled = [self._finished[n][1] for n in made.finished]
        for number in (*made.groups, *made.dropped):
            del self._finished[number], self._requests[number]
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        made_of = self._collector.collected(version, groups, sampled, len(made.dropped), seconds)
        return dataclasses.replace(made_of, running=self._window.running, ready=self._window.ready)
