"""The stream sampler on engines that answer when they are told to: against the synchronous one, and across stops."""

from __future__ import annotations

import json
import queue
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stare_megatron import tasks
from stare_megatron.config import Config, DataConfig, parse
from stare_megatron.data.prompts import PromptStream, load_prompts
from stare_megatron.errors import RunError
from stare_megatron.rollout.collect import Collected, Collector
from stare_megatron.rollout.window import Window
from stare_megatron.run.stream import StreamSampler
from stare_megatron.tasks.tiny_model import make_tokenizer
from stare_megatron.types import GroupRequest, GroupSummary, Status

TOKENIZER = make_tokenizer(tasks.get("order_free_sum"))
P, STEPS = 4, 6


class Engines:
    """Serve whenever asked, in an order of their own. A reference is the request's seed. `version`: what they hold."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._waiting: list[tuple[GroupRequest, int]] = []
        self._lock = threading.Lock()
        self.go = threading.Semaphore(10**6)
        self.dead: BaseException | None = None
        self.given_up = False
        self.version: Callable[[], int] = lambda: 0

    def submit(self, requests: Any) -> None:
        with self._lock:
            self._waiting += [(request, self.version()) for request in requests]

    def results(self) -> Iterator[tuple[GroupRequest, int, GroupSummary]]:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                request, since = self._waiting.pop(self._rng.randrange(len(self._waiting)))
            while not self.go.acquire(timeout=0.01):
                if self.given_up:
                    raise RunError("given up")
            if self.dead:
                raise self.dead
            yield request, request.sampling.seed, summary(request, since)

    def give_up(self) -> None:
        self.given_up = True


def summary(request: GroupRequest, since: int) -> GroupSummary:
    """Of the policy of version `since`. Two of three prompts teach nothing."""
    useful = int(request.prompt.text.split()[0]) % 3 == 0
    rewards = (1.0, 0.0) if useful else (1.0, 1.0)
    done = (Status.COMPLETED,) * 2
    return GroupSummary(
        request.prompt.id, request.prompt.source, rewards, (True,) * 2, (9,) * 2, (3, 5), done, (since,) * 2,
        (True,) * 2, (0,) * 2, 0,
    )  # fmt: skip


def settings() -> Config:
    tree: dict[str, Any] = {
        "run": {"steps": STEPS, "seed": 3},
        "model": {"path": "m"},
        "data": {"train": ["p"]},
        "reward": {"name": "exact"},
        "rollout": {"prompts_per_step": P, "group_size": 2, "max_refills": 5},
    }
    return parse(tree, "test")


@pytest.fixture
def made(tmp_path):
    """Samplers with prompts of their own, all the same; closed at the end."""
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"{i} :", "answer": "1", "id": str(i)} for i in range(100)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    prompts = load_prompts(DataConfig(train=[path]), TOKENIZER)
    samplers: list[StreamSampler[int]] = []

    def make(
        staleness: int, seed: int = 0, stop: Callable[[], bool] = lambda: False
    ) -> tuple[StreamSampler[int], Engines, PromptStream]:
        engines, stream = Engines(seed), PromptStream(prompts, seed=0, shuffle=True)
        window = Window(P, staleness, (staleness + 1) * P, 3, 5 * P, STEPS)
        engines.version = lambda: window.version
        collector = Collector(settings(), engines, stream)
        samplers.append(StreamSampler(collector, stream, window, engines, stop=stop))
        return samplers[-1], engines, stream

    def synchronous() -> tuple[Collector[int], Engines]:
        engines = Engines(9)
        return Collector(settings(), engines, PromptStream(prompts, seed=0, shuffle=True)), engines

    make.synchronous = synchronous  # type: ignore[attr-defined]
    yield make
    for sampler in samplers:
        sampler.close()


def test_without_staleness_batches_are_the_synchronous_ones(made):
    sync, held = made.synchronous()
    want = []
    for step in range(STEPS):
        held.version = lambda step=step: step
        want.append(sync.collect(step))
    for seed in range(4):
        sampler, _, stream = made(0, seed)
        got = []
        for step in range(STEPS):
            got.append(sampler.next_batch(step))
            assert not sampler.ahead()().requests
        assert got == want
        assert stream.state() == sync._stream.state()


def ids(batches: list[Collected[int]]) -> list[str]:
    return [group.prompt_id for batch in batches for _, group in batch.groups]


def dropped(batches: list[Collected[int]]) -> int:
    return sum(int(part.total) for b in batches for part in b.measured if part.name == "groups/dropped")


@pytest.mark.parametrize("staleness", [1, 3])
def test_every_prompt_is_learned_from_or_dropped_once_also_across_a_stop(made, staleness):
    sampler, _, _ = made(staleness)
    batches = [sampler.next_batch(step) for step in range(3)]
    kept = sampler.ahead()()  # as step 3 is learned
    sampler.next_batch(3)  # in hand when the run dies: nobody learns from it
    sampler.close()
    again, _, stream = made(staleness, seed=5)
    again.restore(kept, 3)
    batches += [again.next_batch(step) for step in range(3, STEPS)]
    assert len(set(ids(batches))) == STEPS * P
    assert STEPS * P + dropped(batches) == stream.state().cursor
    # The same draws for the same prompts: none has the seed of another.
    seeds = [ref for batch in batches for ref, _ in batch.groups]
    assert len(set(seeds)) == len(seeds)
    assert {r.sampling.seed for r in kept.requests} >= {
        ref for b in batches[3:] for ref, g in b.groups if g.prompt_id in {r.prompt.id for r in kept.requests}
    }


def test_a_batch_that_breaks_the_bound_ends_the_run(made):
    sampler, engines, _ = made(1)
    engines.version = lambda: 0  # they say so whatever they hold
    assert [len(sampler.next_batch(step).groups) for step in range(2)] == [P, P]
    with pytest.raises(RunError, match=r"a sample was drawn 2 updates ago, and sampling\.max_staleness = 1; this is a"):
        sampler.next_batch(2)


def test_it_waits_for_nobody_while_the_trainer_learns_and_for_all_before_an_evaluation(made):
    sampler, engines, _ = made(2)
    engines.go = threading.Semaphore(0)
    taken: queue.Queue[Any] = queue.Queue()
    waiting = threading.Thread(target=lambda: taken.put(sampler.next_batch(0)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    engines.go.release(10**6)
    waiting.join(300)
    assert len(taken.get_nowait().groups) == P
    sampler.settle()
    sampler.drain()
    assert sampler._window.running == 0
    sampler.next_batch(1)  # and it goes on


def test_an_end_that_is_wanted_is_not_kept_waiting_for_engines_to_have_nothing_to_do(made):
    wanted = threading.Event()
    sampler, engines, _ = made(2, stop=wanted.is_set)
    engines.go = threading.Semaphore(0)
    batch = threading.Thread(target=sampler.next_batch, args=(0,))
    batch.start()
    while batch.is_alive():  # no more than it takes: others are being sampled then
        engines.go.release()
        batch.join(0.01)
    draining = threading.Thread(target=sampler.drain)
    draining.start()
    draining.join(0.1)
    assert draining.is_alive()
    wanted.set()
    draining.join(300)
    assert sampler._window.running


def test_an_engines_death_is_the_loops(made):
    sampler, engines, _ = made(1)
    assert not sampler.busy
    engines.dead = RunError("engine 0: its process died")
    with pytest.raises(RunError, match="engine 0"):
        sampler.next_batch(0)
    assert sampler.busy
    for call in (sampler.settle, sampler.drain):
        with pytest.raises(RunError, match="engine 0"):
            call()


def test_an_end_gives_up_what_is_being_sampled(made):
    sampler, engines, _ = made(2)
    sampler.next_batch(0)
    engines.go = threading.Semaphore(0)
    sampler.close()
    assert engines.given_up
