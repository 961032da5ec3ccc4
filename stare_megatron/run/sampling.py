"""Where update batches come from: sampled while the trainer waits, or while it learns from the batch before.

synchronous   engines  [ batch 1, v0 ]          [ batch 2, v1 ]          [ batch 3, v2 ]
              ranks                   [ learn 1 ]              [ learn 2 ]
one step      engines  [ batch 1, v0 ][ batch 2, v0 ][ batch 3, v1 ][ batch 4, v2 ]
              ranks                   [ learn 1 ]    [ learn 2 ]    [ learn 3 ]
stream        engines  [ groups, v0               ][ v1      ][ v2      ][ v3        (`stream.py`)
              ranks                   [ learn 1 ]  [ learn 2 ][ learn 3 ]
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from stare_megatron.checkpoint import Ahead, Outstanding
from stare_megatron.data.prompts import PromptStream, StreamState
from stare_megatron.errors import GivenUpError
from stare_megatron.rollout.collect import Collected, Collector, GroupDispatcher
from stare_megatron.types import Group, Measured

Ref = TypeVar("Ref")
Ref_co = TypeVar("Ref_co", covariant=True)
Batch_co = TypeVar("Batch_co", covariant=True)

Kept = Callable[[], Ahead | Outstanding | None]
"""What was sampled or ordered ahead of the batches handed out when this was made, as far as it is of use now; None:
nothing is.

Raises:
    GroupsLostError: its groups are lost.
"""


class Sampler(Protocol[Batch_co]):
    """Samples the update batches of a run."""

    def next_batch(self, version: int) -> Batch_co | None:
        """Groups with rewards, for the update of the policy of `version`, which the engines hold; None where an end is
        wanted before they are whole, and what there is of them can be kept.

        Raises:
            RunError: an engine failed.
        """
        ...

    @property
    def busy(self) -> bool:
        """Whether `settle` has something to wait for, or an error to raise."""
        ...

    def settle(self) -> None:
        """Before the engines' weights change: returns when everything is sampled that is to be sampled by these.

        Raises:
            RunError: an engine failed.
        """
        ...

    def drain(self) -> None:
        """Before engines serve others: returns when nothing is being sampled, or an end is wanted. The next batch goes
        on.

        Raises:
            RunError: an engine failed.
        """
        ...

    def state(self) -> StreamState:
        """Where the prompts stand, for a checkpoint, after the batches handed out: what was drawn ahead of them is
        drawn again by who goes on from here without `ahead`."""
        ...

    def ahead(self) -> Kept:
        """What a checkpoint keeps beside `state`, to be asked for when it is written."""
        ...

    def close(self) -> None:
        """Give up what is being sampled."""
        ...


class Engines(GroupDispatcher[Ref_co], Protocol[Ref_co]):
    """Where a sampler's thread has requests served."""

    def give_up(self) -> None:
        """Make `results` end soon, with a GivenUpError."""
        ...


class PolicyEngines(Engines[Ref_co], Protocol[Ref_co]):
    """Those that sample a batch by one policy, which they may lose."""

    def forget(self) -> None:
        """`results` has ended: drop what it waited for."""
        ...

    def have_weights(self) -> bool:
        """Whether some engine has the weights of the last push, or may have."""
        ...


class SynchronousSampler(Generic[Ref]):
    """A batch is sampled whole while the trainer waits, every token by the newest policy."""

    def __init__(self, collector: Collector[Ref], stream: PromptStream) -> None:
        self._collector = collector
        self._stream = stream

    def next_batch(self, version: int) -> Collected[Ref]:
        return self._collector.collect(version)

    @property
    def busy(self) -> bool:
        return False

    def settle(self) -> None: ...

    def drain(self) -> None: ...

    def state(self) -> StreamState:
        return self._stream.state()

    def ahead(self) -> Kept:
        return _nothing

    def close(self) -> None: ...


@dataclass(frozen=True)
class Drawn(Generic[Ref]):
    """A batch, and where the prompts stand after it."""

    batch: Collected[Ref]
    after: StreamState


@dataclass(frozen=True)
class Store(Generic[Ref]):
    """Groups by the references that stand for them, and back. `fetch` raises GroupsLostError where one is lost."""

    fetch: Callable[[Sequence[Ref]], Sequence[Group]]
    put: Callable[[Group], Ref]


class OneStepSampler(Generic[Ref]):
    """The next batch is sampled while the trainer learns from the one before, whole and by one policy: the one that
    the trainer is changing. Only the first batch of a run is of the newest policy.

    What it samples depends on stream, seed and step, as the synchronous one's does. Its last batch is that of
    `steps`. When all engines are lost while the trainer learns, nobody has the policy that the next batch was begun
    with: it is sampled again, the same prompts and seeds, by the newest. `note`: tells the user so.
    """

    def __init__(
        self,
        collector: Collector[Ref],
        stream: PromptStream,
        store: Store[Ref],
        steps: int,
        engines: PolicyEngines[Ref],
        note: Callable[[str], None],
    ) -> None:
        self._collector = collector
        self._stream = stream
        self._store = store
        self._steps = steps
        self._engines = engines
        self._note = note
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "sampling")  # refills are ordered while the ranks work
        self._ahead: Future[Drawn[Ref]] | None = None
        self._state = stream.state()
        self._again = False  # the next batch was given up, and is sampled when it is asked for

    def restore(self, batch: Ahead) -> None:
        """The first batch is this one, which the checkpoint keeps that the run goes on from."""
        refs = [self._store.put(group) for group in batch.groups]
        groups = tuple(zip(refs, batch.summaries, strict=True))
        self._stream.restore(batch.after)
        self._ahead = Future()
        self._ahead.set_result(Drawn(Collected(groups, batch.sampled, batch.measured, batch.seconds), batch.after))

    def next_batch(self, version: int) -> Collected[Ref]:
        """As `Sampler`; the batch after it is begun."""
        drawn = self._ahead.result() if self._ahead else self._draw(version)
        if self._again:
            measured = (*drawn.batch.measured, Measured("fleet/groups_again", len(drawn.batch.sampled)))
            drawn = Drawn(dataclasses.replace(drawn.batch, measured=measured), drawn.after)
            self._again = False
        self._state = drawn.after
        more = version + 1 < self._steps
        self._ahead = self._thread.submit(self._draw, version + 1) if more else None
        return drawn.batch

    @property
    def busy(self) -> bool:
        return self._ahead is not None and not (self._ahead.done() and self._ahead.exception() is None)

    def settle(self) -> None:
        """As `Sampler`; what no engine has the weights for is given up."""
        while self._ahead and not concurrent.futures.wait([self._ahead], _GLANCE_S).done:
            if not self._engines.have_weights():
                self._give_up(self._ahead)
        if self._ahead:
            self._ahead.result()

    def drain(self) -> None:
        self.settle()

    def state(self) -> StreamState:
        return self._state

    def ahead(self) -> Kept:
        return functools.partial(self._kept, self._ahead) if self._ahead else _nothing

    def close(self) -> None:
        if self._ahead and not self._ahead.done():
            self._engines.give_up()
        self._thread.shutdown()

    def _give_up(self, ahead: Future[Drawn[Ref]]) -> None:
        """The batch is sampled by the weights that are pushed next, unless it is whole before it can be given up."""
        self._engines.give_up()
        try:
            ahead.result()
        except GivenUpError:
            self._stream.restore(self._state)
            self._ahead, self._again = None, True
            self._note(
                "all engines were lost while the ranks learned, and with them the weights that the next batch was "
                "begun with: it is sampled again by the newest policy"
            )
        self._engines.forget()

    def _draw(self, version: int) -> Drawn[Ref]:
        return Drawn(self._collector.collect(version), self._stream.state())

    def _kept(self, ahead: Future[Drawn[Ref]]) -> Ahead | None:
        if not ahead.done() or ahead.exception():
            return None
        drawn = ahead.result()
        refs, summaries = zip(*drawn.batch.groups, strict=True)
        return Ahead(
            groups=tuple(self._store.fetch(refs)),
            summaries=summaries,
            sampled=drawn.batch.sampled,
            measured=drawn.batch.measured,
            seconds=drawn.batch.seconds,
            after=drawn.after,
        )


_GLANCE_S = 1.0


def _nothing() -> None: ...
