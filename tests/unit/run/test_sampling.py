"""Both samplers on a collector that waits to be let go: who samples when, and what a checkpoint must know of it."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from stare_megatron.checkpoint import Ahead
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import EngineLostError, GivenUpError, RunError
from stare_megatron.rollout.collect import Collected
from stare_megatron.run import sampling
from stare_megatron.run.sampling import OneStepSampler, Store, SynchronousSampler
from stare_megatron.types import Measured

TAKEN = 32
SOON = 20.0


class Stream:
    def __init__(self) -> None:
        self.cursor = 0

    def state(self) -> StreamState:
        return StreamState(0, self.cursor, 7, "x")

    def restore(self, state: StreamState) -> None:
        self.cursor = state.cursor


class Collector:
    """Takes prompts when it begins, and ends when it is let go."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.begun: list[int] = []
        self.go: dict[int, threading.Event] = {}
        self.given_up = threading.Event()
        self.error: BaseException | None = None
        self.lost: BaseException | None = None  # what it finds before it gives up

    def event(self, step: int) -> threading.Event:
        return self.go.setdefault(step, threading.Event())

    def collect(self, step: int) -> Any:
        self.begun.append(step)
        self.stream.cursor += TAKEN
        while not self.event(step).wait(0.01):
            if self.given_up.is_set():
                raise self.lost or GivenUpError("given up")
        if self.error:
            raise self.error
        return batch(step)


def batch(step: int) -> Any:
    return Collected(((f"ref {step}", f"summary {step}"),), (f"summary {step}",), (), 1.5)  # type: ignore[arg-type]


class Engines:
    """`alive`: they have the weights of the last push."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self.alive = True

    def have_weights(self) -> bool:
        return self.alive

    def give_up(self) -> None:
        self._collector.given_up.set()

    def forget(self) -> None:
        self._collector.given_up.clear()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "_GLANCE_S", 0.01)
    stream = Stream()
    collector = Collector(stream)
    store: Any = Store(lambda refs: [f"group of {ref}" for ref in refs], lambda group: f"ref of {group}")  # type: ignore[arg-type]
    engines, notes = Engines(collector), []
    sampler: Any = OneStepSampler(collector, stream, store, 4, engines, notes.append)  # type: ignore[arg-type]
    yield SimpleNamespace(stream=stream, collector=collector, sampler=sampler, engines=engines, notes=notes)
    sampler.close()


def let_go(parts: Any, step: int) -> None:
    parts.collector.event(step).set()
    parts.sampler.settle()


def test_a_synchronous_batch_is_collected_whole_and_the_state_is_that_of_the_prompts():
    stream = Stream()
    collector = Collector(stream)
    collector.event(4).set()
    sampler: Any = SynchronousSampler(collector, stream)  # type: ignore[arg-type]
    assert sampler.state().cursor == 0
    assert sampler.next_batch(4) == batch(4)
    sampler.settle()
    assert sampler.state().cursor == TAKEN
    assert sampler.ahead()() is None
    assert collector.begun == [4]


def test_the_next_batch_is_begun_when_one_is_handed_out_and_is_whole_when_weights_may_change(parts):
    sampler, collector = parts.sampler, parts.collector
    collector.event(0).set()
    assert sampler.next_batch(0) == batch(0)
    # Batch 1 is sampled now, by the engines' version 0; nobody waits for it before the weights change.
    settled = threading.Thread(target=sampler.settle)
    settled.start()
    settled.join(0.2)
    assert settled.is_alive()
    assert sampler.busy
    assert collector.begun == [0, 1]
    collector.event(1).set()
    settled.join(SOON)
    assert not settled.is_alive()
    assert not sampler.busy
    assert sampler.next_batch(1) == batch(1)
    let_go(parts, 2)
    assert sampler.next_batch(2) == batch(2)
    let_go(parts, 3)
    assert sampler.next_batch(3) == batch(3)
    sampler.settle()
    assert collector.begun == [0, 1, 2, 3]  # none for a step that does not come


def test_what_a_checkpoint_keeps(parts):
    sampler, collector = parts.sampler, parts.collector
    assert (sampler.state().cursor, sampler.ahead()()) == (0, None)
    collector.event(0).set()
    sampler.next_batch(0)
    learned = sampler.ahead()  # as of step 1
    assert sampler.state().cursor == TAKEN
    assert learned() is None  # not whole: drawn again by who goes on from here
    let_go(parts, 1)
    assert sampler.state().cursor == TAKEN
    kept = Ahead(("group of ref 1",), ("summary 1",), ("summary 1",), (), 1.5, StreamState(0, 2 * TAKEN, 7, "x"))  # type: ignore[arg-type]
    assert learned() == kept
    # Handed out and not learned from yet: still what step 1 keeps, and not what step 2 will.
    sampler.next_batch(1)
    assert learned() == kept
    assert sampler.ahead()() is None
    assert sampler.state().cursor == 2 * TAKEN


def test_a_batch_that_was_kept_is_the_first(parts):
    sampler, collector, stream = parts.sampler, parts.collector, parts.stream
    sampler.restore(Ahead(("g",), ("s",), ("s", "t"), (), 2.5, StreamState(0, 5 * TAKEN, 7, "x")))  # type: ignore[arg-type]
    assert sampler.state().cursor == 0
    kept = sampler.ahead()()
    assert kept.groups == ("group of ref of g",)
    assert (kept.sampled, kept.after.cursor) == (("s", "t"), 5 * TAKEN)
    assert sampler.next_batch(2) == Collected((("ref of g", "s"),), ("s", "t"), (), 2.5)  # type: ignore[arg-type]
    let_go(parts, 3)
    assert collector.begun == [3]
    assert sampler.state().cursor == 5 * TAKEN
    assert stream.cursor == 6 * TAKEN


def test_an_error_of_the_thread_is_the_loops_and_nothing_is_kept_of_it(parts):
    sampler, collector = parts.sampler, parts.collector
    collector.event(0).set()
    sampler.next_batch(0)
    kept = sampler.ahead()
    collector.error = RunError("engine 0: its process died")
    collector.event(1).set()
    with pytest.raises(RunError, match="engine 0"):
        sampler.settle()
    assert sampler.busy  # the loop asks this before it settles
    with pytest.raises(RunError, match="engine 0"):
        sampler.next_batch(1)
    assert kept() is None


def test_an_end_gives_up_what_is_being_sampled(parts):
    sampler, collector = parts.sampler, parts.collector
    collector.event(0).set()
    sampler.next_batch(0)
    sampler.close()  # returns, although nobody lets batch 1 go
    assert collector.given_up.is_set()
    assert sampler.ahead()() is None


def test_a_batch_that_no_engine_has_the_weights_for_is_sampled_again(parts):
    """The same prompts, for the same step, once the newest weights are there; and it is counted."""
    sampler, collector, stream = parts.sampler, parts.collector, parts.stream
    collector.event(0).set()
    sampler.next_batch(0)
    kept = sampler.ahead()
    parts.engines.alive = False
    sampler.settle()  # returns, although nobody lets batch 1 go
    assert len(parts.notes) == 1
    assert not sampler.busy
    assert kept() is None
    assert sampler.ahead()() is None
    assert sampler.state().cursor == stream.cursor == TAKEN
    sampler.drain()
    parts.engines.alive = True
    collector.event(1).set()
    counted = Measured("fleet/groups_again", 1)
    assert sampler.next_batch(1) == dataclasses.replace(batch(1), measured=(counted,))
    assert sampler.state().cursor == 2 * TAKEN
    let_go(parts, 2)
    assert collector.begun == [0, 1, 1, 2]
    assert sampler.next_batch(2) == batch(2)


def test_it_is_not_while_an_engine_has_them(parts):
    sampler, collector = parts.sampler, parts.collector
    collector.event(0).set()
    sampler.next_batch(0)
    settled = threading.Thread(target=sampler.settle)
    settled.start()
    settled.join(0.2)
    assert not collector.given_up.is_set()
    collector.event(1).set()
    settled.join(SOON)
    assert sampler.next_batch(1) == batch(1)
    assert parts.notes == []


def test_engines_that_do_not_come_back_end_the_run(parts):
    sampler, collector = parts.sampler, parts.collector
    collector.event(0).set()
    sampler.next_batch(0)
    collector.lost = EngineLostError("0 of 1 engines are left")
    parts.engines.alive = False
    with pytest.raises(EngineLostError, match="0 of 1"):
        sampler.settle()
    assert parts.notes == []
