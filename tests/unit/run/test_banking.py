"""Streams that are killed at any moment and go on from their checkpoints: every prompt once, none too old, and nothing
by weights that were lost. Engines are stood in for; what is written is on a disk."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron import tasks
from stare_megatron.checkpoint import Bank, Outstanding, read_ahead
from stare_megatron.checkpoint import ahead as stored
from stare_megatron.config import DataConfig
from stare_megatron.data.prompts import PromptSet, PromptStream, load_prompts
from stare_megatron.errors import RunError
from stare_megatron.rollout.collect import Collector
from stare_megatron.rollout.window import Window
from stare_megatron.run.banking import Banking
from stare_megatron.run.sampling import Store
from stare_megatron.run.stream import StreamSampler
from stare_megatron.tasks.tiny_model import make_tokenizer
from stare_megatron.types import (
    Begun,
    Completion,
    Graded,
    Group,
    GroupRequest,
    GroupSummary,
    Partial,
    Score,
    Span,
    SpanKind,
    Status,
    Trajectory,
)
from tests.properties import bounded
from tests.unit.run.test_stream import STEPS, P, settings

TOKENS = 4
NONE = np.zeros(0, np.float32)


class Engines:
    """Draw a token of a sample after the other, of any group; few while nobody waits. A log-prob is the number of the
    weights that drew it, of which no two histories have one in common."""

    def __init__(self, seed: int, version: int, weights: int) -> None:
        self.version, self.weights = version, weights
        self.refs: dict[int, Group] = {}
        self.waited_for = True
        self._rng = random.Random(seed)
        self._under_way: dict[int, tuple[GroupRequest, list[list[tuple[int, int]]]]] = {}
        self._lock = threading.Lock()
        self._given_up = False

    def submit(self, requests: Any) -> None:
        with self._lock:
            for request in requests:
                drawn: list[list[tuple[int, int]]] = [[] for _ in range(request.group_size)]
                for graded in request.begun.graded:
                    drawn[graded.sample] = tokens_of(graded.trajectory.spans[1].logprobs, graded.trajectory.versions())
                for partial in request.begun.partial:
                    versions = [v for v, n in partial.drawn.versions for _ in range(n)]
                    drawn[partial.sample] = tokens_of(partial.drawn.logprobs, versions)
                assert request.sampling.seed not in self._under_way
                self._under_way[request.sampling.seed] = request, drawn

    def results(self) -> Iterator[tuple[GroupRequest, int, GroupSummary]]:
        while not self._given_up:
            while not (self.waited_for or self._given_up or self._rng.random() < 0.2):
                time.sleep(0.0005)
            with self._lock:
                if not self._under_way:
                    return
                # Mostly one after the other, so that groups stand with some samples finished.
                request, drawn = self._under_way[self._one_of(list(self._under_way))]
                left = [sample for sample in drawn if len(sample) < TOKENS]
                if left:
                    self._one_of(left).append((self.version, self.weights))
                    continue
                del self._under_way[request.sampling.seed]
                ref, group = len(self.refs), whole(request, drawn)
                self.refs[ref] = group
            yield request, ref, group.summary()
        raise RunError("given up")

    def _one_of(self, those: list[Any]) -> Any:
        return those[0] if self._rng.random() < 0.8 else self._rng.choice(those)

    def begun(self) -> Mapping[int, Begun]:
        with self._lock:
            return {seed: begun_of(*under_way) for seed, under_way in self._under_way.items()}

    def push(self, version: int, weights: int) -> None:
        with self._lock:
            self.version, self.weights = version, weights

    def give_up(self) -> None:
        self._given_up = True

    def put(self, group: Group) -> int:
        with self._lock:
            self.refs[len(self.refs)] = group
            return len(self.refs) - 1


def tokens_of(logprobs: Any, versions: Any) -> list[tuple[int, int]]:
    return [(int(v), int(w)) for w, v in zip(logprobs, [v for v in versions if v >= 0], strict=True)]


def completion(drawn: list[tuple[int, int]], status: Status) -> Completion:
    runs = tuple((version, 1) for version, _ in drawn)
    logprobs = np.array([weights for _, weights in drawn], np.float32)
    return Completion(np.ones(len(drawn), np.int32), logprobs, status, runs[0][0], versions=runs)


def trajectory(request: GroupRequest, sample: int, drawn: list[tuple[int, int]]) -> Trajectory:
    made = completion(drawn, Status.COMPLETED)
    prompt = Span(SpanKind.PROMPT, np.array(request.prompt.token_ids, np.int32), NONE)
    action = Span(SpanKind.ACTION, made.token_ids, made.logprobs, made.versions)
    versions = [version for version, _ in drawn]
    ends = min(versions), max(versions)
    return Trajectory(request.prompt.id, sample, (prompt, action), Status.COMPLETED, ends, request.sampling.seed)


def score(request: GroupRequest, sample: int) -> Score:
    """Two of three prompts teach nothing."""
    useful = int(request.prompt.text.split()[0]) % 3 == 0
    return Score(float(sample) if useful else 1.0, True, "")


def whole(request: GroupRequest, drawn: list[list[tuple[int, int]]]) -> Group:
    trajectories = tuple(trajectory(request, n, tokens) for n, tokens in enumerate(drawn))
    return Group(request.prompt, trajectories, tuple(score(request, n) for n in range(len(drawn))))


def begun_of(request: GroupRequest, drawn: list[list[tuple[int, int]]]) -> Begun:
    done = [n for n, tokens in enumerate(drawn) if len(tokens) == TOKENS]
    part = [n for n, tokens in enumerate(drawn) if 0 < len(tokens) < TOKENS]
    prompt = np.array(request.prompt.token_ids, np.int32)
    return Begun(
        tuple(Graded(n, trajectory(request, n, drawn[n]), score(request, n)) for n in done),
        tuple(Partial(n, prompt, completion(drawn[n], Status.TRUNCATED), ended=False) for n in part),
    )


class World:
    """A run, whatever becomes of its processes: what is on disk, and what the history that survives has learned from.
    `weights`: their number, by version, in that history."""

    def __init__(self, folder: Path, prompts: PromptSet, staleness: int, seed: int) -> None:
        self.folder, self.prompts, self.staleness = folder, prompts, staleness
        self.rng = random.Random(seed)
        self.weights = [0]
        self.pushed = 0  # weights that there have been in any history
        self.learned: list[list[str]] = []
        self.dropped: list[int] = []
        self.saved: list[tuple[int, Path]] = []
        self.notes: list[str] = []
        self.resumed = [0, 0, 0, 0]
        self.given_up = 0  # batches

    def life(self, ends: int, *, bank: bool = True, stop: int = STEPS) -> PromptStream:
        """A process: from the newest checkpoint until it is killed with so many updates done, or an end is wanted when
        `stop` are, or to the end."""
        step, kept = 0, None
        if self.saved:
            step, folder = self.saved[-1]
            kept = read_ahead(folder)
        del self.weights[step + 1 :], self.learned[step:], self.dropped[step:]
        stream = PromptStream(self.prompts, seed=0, shuffle=True)
        engines = Engines(self.rng.randrange(2**32), step, self.weights[step])
        store = Store(lambda refs: [engines.refs[ref] for ref in refs], engines.put)
        banking = Banking(Bank(self.folder / "bank"), store, self.notes.append) if bank else None
        window = Window(P, self.staleness, (self.staleness + 1) * P, 4, 5 * P, STEPS)
        collector, wanted = Collector(settings(), engines, stream), threading.Event()
        sampler = StreamSampler(collector, stream, window, engines, banking, wanted.is_set)
        learned = None
        try:
            if isinstance(kept, Outstanding):
                sampler.restore(kept, step)
            while step < STEPS:
                if step == stop:
                    wanted.set()
                engines.waited_for = not wanted.is_set()
                batch = sampler.next_batch(step)
                engines.waited_for = False
                if batch is None:
                    learned = None  # nobody sees an error
                    if not self.saved or self.saved[-1][0] != step:
                        self.save(banking, step, sampler.ahead())
                    self.given_up += 1
                    break
                for ref, _ in batch.groups:
                    self.check(step, engines.refs[ref])
                r = batch.resumed
                for n, value in enumerate((r.groups, r.graded, r.partial, r.again)):
                    self.resumed[n] += value
                if step == ends:  # in hand, and nobody has learned from it
                    break
                self.learned.append([group.prompt_id for _, group in batch.groups])
                self.dropped.append(sum(int(m.total) for m in batch.measured if m.name == "groups/dropped"))
                step += 1
                learned = sampler.ahead()
                self.pushed += 1
                self.weights.append(self.pushed)
                engines.push(step, self.pushed)
                time.sleep(self.rng.choice([0, 0.002, 0.01]))
                if wanted.is_set():  # the batch was there: its step is done, and the last
                    self.save(banking, step, sampler.ahead())
                    learned = None
                    break
                if self.rng.random() < 0.5:
                    self.save(banking, step, sampler.ahead())
        finally:
            sampler.close()
        if learned is not None and self.rng.random() < 0.5:  # the step learned last is saved, since an error ended it
            self.save(banking, step, learned)
        return stream

    def save(self, banking: Banking[int] | None, step: int, kept: Any) -> None:
        folder = self.folder / f"{step}-{len(self.saved)}-{self.pushed}"
        folder.mkdir()
        stored.write(folder, kept())
        self.saved.append((step, folder))
        if banking is not None:
            banking.durable(step)

    def check(self, version: int, group: Group) -> None:
        """It is in time, and by weights that the run has or had in this history."""
        for t in group.trajectories:
            drawn = tokens_of(t.spans[1].logprobs, t.versions())
            assert len(drawn) == TOKENS
            assert all(version - self.staleness <= v <= version for v, _ in drawn)
            assert all(self.weights[v] == weights for v, weights in drawn)

    def lose(self, share: float) -> None:
        """What was not on disk yet when the process was killed, or is damaged."""
        for file in sorted((self.folder / "bank").glob("*/*.npz")):
            if self.rng.random() < share:
                file.write_bytes(file.read_bytes()[: self.rng.randrange(400)])

    def finished(self, stream: PromptStream) -> None:
        ids = [prompt for step in self.learned for prompt in step]
        assert len(ids) == len(set(ids)) == STEPS * P
        assert STEPS * P + sum(self.dropped) == stream.state().cursor


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> PromptSet:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = [{"prompt": f"{i} :", "answer": "1", "id": str(i)} for i in range(200)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_prompts(DataConfig(train=[path]), make_tokenizer(tasks.get("order_free_sum")))


@bounded(25)
@given(
    kills=st.lists(st.integers(0, STEPS - 1), max_size=4),
    staleness=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)
def test_killed_at_any_moment_every_prompt_is_learned_from_once(
    tmp_path_factory, prompts, kills, staleness, seed, share
):
    world = World(tmp_path_factory.mktemp("world"), prompts, staleness, seed)
    for kill in kills:
        world.life(kill)
        world.lose(share)
    world.finished(world.life(-1))
    assert all("damaged" in note for note in world.notes)


@bounded(25)
@given(stops=st.lists(st.integers(0, STEPS - 1), max_size=4), staleness=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_stopped_while_a_batch_is_sampled_every_prompt_is_learned_from_once(
    tmp_path_factory, prompts, stops, staleness, seed
):
    world = World(tmp_path_factory.mktemp("world"), prompts, staleness, seed)
    for stop in stops:
        world.life(-1, stop=stop)
    world.finished(world.life(-1))
    assert not world.notes


def test_a_batch_is_not_waited_for_when_an_end_is_wanted(tmp_path, prompts):
    """But for the first of a process, without which it would come no further; what there was of it goes on. In as many
    worlds as it takes: a batch may be whole by then."""
    given_up = went_on = 0
    for n in range(20):
        (tmp_path / str(n)).mkdir()
        world = World(tmp_path / str(n), prompts, 3, n)
        world.life(-1, stop=0)
        assert (world.given_up, len(world.learned)) == (0, 1)
        for stop in (3, 5):
            world.life(-1, stop=stop)
        world.finished(world.life(-1))
        given_up, went_on = given_up + world.given_up, went_on + sum(world.resumed[:3])
        if given_up and went_on:
            break
    assert given_up
    assert went_on


def test_a_batch_is_waited_for_where_nothing_would_keep_it(tmp_path, prompts):
    world = World(tmp_path, prompts, 3, 1)
    world.life(-1, bank=False, stop=2)
    assert (world.given_up, len(world.learned)) == (0, 3)


def test_what_was_sampled_is_used(tmp_path, prompts):
    """Finished groups, finished samples and partial ones go on, in as many worlds as it takes; none without a bank."""
    used = [0, 0, 0]
    for n in range(20):
        (tmp_path / str(n)).mkdir()
        world = World(tmp_path / str(n), prompts, 3, n)
        for kill in (1, 2, 2, 4, 5):
            world.life(kill)
        world.finished(world.life(-1))
        assert not world.notes
        used = [a + b for a, b in zip(used, world.resumed, strict=False)]
        if all(used):
            break
    assert all(used), used
    without = World(tmp_path / "without", prompts, 3, 1)
    (tmp_path / "without").mkdir()
    for kill in (2, 4):
        without.life(kill, bank=False)
    without.finished(without.life(-1, bank=False))
    assert without.resumed[:3] == [0, 0, 0]
    assert not (tmp_path / "without/bank").exists()


def test_a_disk_that_cannot_be_written_costs_only_the_bank(tmp_path, prompts):
    (tmp_path / "bank").write_text("in the way")
    world = World(tmp_path, prompts, 2, 4)
    for kill in (3, 5):
        world.life(kill)
    world.finished(world.life(-1))
    assert world.resumed[0] == 0
    assert all("cannot be kept" in note for note in world.notes)
    assert len(world.notes) <= 3  # once a process
