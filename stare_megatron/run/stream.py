"""Groups are sampled all the time: batches are drawn from what is finished, and weights change under the rest."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from stare_megatron.checkpoint import Outstanding
from stare_megatron.data.prompts import PromptStream, StreamState
from stare_megatron.errors import RunError
from stare_megatron.rollout.collect import Collected, Collector, Resumed
from stare_megatron.rollout.window import Batch, Window
from stare_megatron.run.banking import Banking, Done, Restored
from stare_megatron.run.sampling import Engines, Kept
from stare_megatron.types import Begun, GroupRequest, GroupSummary

_GLANCE_S = 1.0

Ref = TypeVar("Ref")
Ref_co = TypeVar("Ref_co", covariant=True)


class StreamEngines(Engines[Ref_co], Protocol[Ref_co]):
    """Engines that tell what they are at."""

    def begun(self) -> Mapping[int, Begun]:
        """What there is of the groups under way, by the seed of their request, as far as that can be told now."""
        ...


@dataclass(frozen=True)
class _Ordered:
    """A request, and the version that its group was begun with."""

    request: GroupRequest
    since: int

    @property
    def seed(self) -> int:
        return self.request.sampling.seed


class StreamSampler(Generic[Ref]):
    """Admits and draws as `window` says. A thread takes what engines finish, and orders the next at once.

    Seeds derive from the version that engines held when a group was admitted, and its number among those: without
    staleness they are those of the synchronous sampler, and so is everything else. `banking`: keeps what is sampled and
    not learned from for a run that goes on; None: it samples that again. `stop`: whether an end is wanted: with
    `banking` nobody waits for a batch then, but for the first.
    """

    def __init__(
        self,
        collector: Collector[Ref],
        stream: PromptStream,
        window: Window,
        engines: StreamEngines[Ref],
        banking: Banking[Ref] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._collector = collector
        self._stream = stream
        self._window = window
        self._engines = engines
        self._banking = banking
        self._stop = stop
        self._learned = 0  # updates, when that of the batch handed out last is done
        self._again: collections.deque[Restored[Ref]] = collections.deque()
        self._resumed = Resumed()
        self._ordered: dict[int, _Ordered] = {}  # of groups in no batch
        self._finished: dict[int, Done[Ref]] = {}
        self._in_hand: dict[int, Done[Ref]] = {}  # of the batch handed out last
        self._since = time.monotonic()
        self._held = True  # nothing is admitted
        self._closed = False
        self._changed = threading.Condition()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "sampling")
        self._serving = self._thread.submit(self._serve)
        self._serving.add_done_callback(self._ended)

    def restore(self, kept: Outstanding, step: int) -> Resumed:
        """The first groups are those of a checkpoint of `step`: the same prompts, and what there is of them; the rest
        is sampled again, with the same seeds."""
        self._stream.restore(kept.after)
        if self._banking is None:
            self._again.extend(Restored(dataclasses.replace(r, begun=Begun()), 0) for r in kept.requests)
        else:
            self._again.extend(self._banking.restore(kept, step))
        return sum((_kept_of(of) for of in self._again), Resumed())

    def next_batch(self, version: int) -> Collected[Ref] | None:
        """As `Sampler`; waits until enough groups are finished that may be learned from."""
        with self._changed:
            self._held, self._learned = False, version
            self._window.begin(version)
            self._admit()
            while (made := self._draw()) is None:
                if self._stop() and self._in_hand and self._banking is not None:
                    return None
                self._changed.wait(_GLANCE_S)
            self._learned = version + 1
            return self._collected(version, made)

    @property
    def busy(self) -> bool:
        return self._serving.done()

    def settle(self) -> None:
        """Weights may change at any time."""
        self._raise()

    def drain(self) -> None:
        """Wait until nothing is being sampled, or an end is wanted; the next batch goes on."""
        with self._changed:
            self._held = True
            while self._window.running and not self._stop():
                self._raise()
                self._changed.wait(_GLANCE_S)

    def state(self) -> StreamState:
        return self._stream.state()

    def ahead(self) -> Kept:
        """As `Sampler`, after the update of the batch handed out last."""
        with self._changed:
            step, after = self._learned, self._stream.state()
            ordered, again = {n: self._ordered[n] for n in sorted(self._ordered)}, tuple(self._again)
        return lambda: self._kept(step, ordered, again, after)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._engines.give_up()
        self._thread.shutdown()
        if self._banking is not None:
            self._banking.close()

    def _kept(
        self, step: int, ordered: Mapping[int, _Ordered], again: tuple[Restored[Ref], ...], after: StreamState
    ) -> Outstanding:
        since = (*(of.since for of in ordered.values()), *(of.since for of in again))
        requests = (*(of.request for of in ordered.values()), *(of.request for of in again))
        if self._banking is None:
            return Outstanding(requests, after, since)
        waited = ordered.keys() - self._finished.keys() - self._in_hand.keys()
        begun = self._engines.begun() if waited else {}  # first: who finishes meanwhile goes to the bank
        with self._changed:
            done = {of.seed: self._finished.get(n) or self._in_hand.get(n) for n, of in ordered.items()}
            done |= {of.request.sampling.seed: of.done for of in again}
            shelf = self._banking.open(step, done)
        seeds = [request.sampling.seed for request in requests]
        kept = [
            dataclasses.replace(request, begun=Begun() if done[seed] and shelf else begun.get(seed, request.begun))
            for request, seed in zip(requests, seeds, strict=True)
        ]
        return Outstanding(tuple(kept), after, since, shelf)

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
            if self._again:
                old = self._renewed(self._again.popleft(), place.number)
                request, since = dataclasses.replace(old.request, order=place.number), old.since
            else:
                old, request, since = None, self._collector.request(place.version, place.order), place.version
                request = dataclasses.replace(request, order=place.number)
            self._ordered[place.number] = _Ordered(request, since)
            if old and old.done:
                self._finish(place.number, *old.done)
            else:
                new.append(request)
        if new:
            self._engines.submit(new)
        self._changed.notify_all()

    def _renewed(self, old: Restored[Ref], number: int) -> Restored[Ref]:
        """`old` with what there is of it, if it can be learned from in time; else to be sampled from its beginning."""
        if (old.done or old.request.begun) and not self._window.hasten(number, old.since):
            old = Restored(dataclasses.replace(old.request, begun=Begun()), old.since)
        self._resumed += _kept_of(old)
        return old if old.done or old.request.begun else dataclasses.replace(old, since=self._window.version)

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
            self._finish(number, ref, summary)
            if self._banking is not None:
                self._banking.finished(self._ordered[number].seed, ref, summary)
            self._admit()
            self._changed.notify_all()

    def _finish(self, number: int, ref: Ref, summary: GroupSummary) -> None:
        self._finished[number] = ref, summary
        self._window.finish(number, useful=self._collector.useful(summary))

    def _collected(self, version: int, made: Batch) -> Collected[Ref]:
        groups = [self._finished[n] for n in made.groups]
        for _, summary in groups:
            self._require_in_time(version, summary)
        sampled = [self._finished[n][1] for n in made.finished]
        self._in_hand = {n: self._finished.pop(n) for n in (*made.groups, *made.dropped)}
        for number in self._in_hand:
            del self._ordered[number]
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        made_of = self._collector.collected(version, groups, sampled, len(made.dropped), seconds)
        resumed, self._resumed = self._resumed, Resumed()
        running, ready = self._window.running, self._window.ready
        return dataclasses.replace(made_of, running=running, ready=ready, resumed=resumed)

    def _require_in_time(self, version: int, group: GroupSummary) -> None:
        """Raises: RunError: a policy that drew a part of it is older than the bound allows."""
        age = version - min(group.weight_versions)
        if age > self._window.staleness:
            raise RunError(
                f"prompt {group.prompt_id!r}: a sample was drawn {age} updates ago, and sampling.max_staleness = "
                f"{self._window.staleness}; this is a fault of the program: report it, and go on with run.resume=auto"
            )


def _kept_of(old: Restored[Ref]) -> Resumed:
    if old.done:
        return Resumed(groups=1)
    graded, partial = len(old.request.begun.graded), len(old.request.begun.partial)
    return Resumed(graded=graded, partial=partial, again=old.request.group_size - graded - partial)
