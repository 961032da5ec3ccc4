"""Episodes that are broken off at any moment and gone on with elsewhere: what was drawn stays, and the rest fits it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron.envs.base import End
from stare_megatron.envs.single_turn import SingleTurn
from stare_megatron.rollout.episode import run_group
from stare_megatron.rollout.under_way import FirstTurn, GroupUnderWay, stopped
from stare_megatron.types import (
    Completion,
    Group,
    GroupRequest,
    Partial,
    Prompt,
    Sampling,
    Score,
    Status,
    Trajectory,
)
from tests.properties import bounded

PROMPT = Prompt("p", "sums", "1 +", (5, 6), "7")
BUDGET, SIZE, EOS = 12, 4, 0


class Ticking:
    """An engine that draws a token of every request in each turn of the loop. A log-prob tells version and token."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.running: dict[int, list[tuple[int, int]]] = {}
        self.asked: list[tuple[tuple[int, ...], int, int]] = []

    async def sample(self, token_ids: Sequence[int], sampling: Sampling) -> Completion:
        rng, mine = random.Random(sampling.seed), []
        assert sampling.seed not in self.running
        self.asked.append((tuple(token_ids), sampling.max_tokens, sampling.seed))
        self.running[sampling.seed] = mine
        status = Status.TRUNCATED
        while len(mine) < sampling.max_tokens and status is Status.TRUNCATED:
            await asyncio.sleep(0)
            mine.append((rng.randrange(6), self.version))
            status = Status.COMPLETED if mine[-1][0] == EOS else status
        return completion(self.running.pop(sampling.seed), status)

    def drawn(self) -> dict[int, Completion]:
        return {seed: completion(mine, Status.TRUNCATED) for seed, mine in self.running.items() if mine}


def completion(drawn: list[tuple[int, int]], status: Status) -> Completion:
    runs: list[tuple[int, int]] = []
    for _, version in drawn:
        runs = [*runs[:-1], (version, runs[-1][1] + 1)] if runs and runs[-1][0] == version else [*runs, (version, 1)]
    logprobs = np.array([told(token, version) for token, version in drawn], np.float32)
    ids = np.array([token for token, _ in drawn], np.int32)
    return Completion(ids, logprobs, status, runs[0][0], versions=tuple(runs))


def told(token: int, version: int) -> float:
    return -version - token / 8


async def graded(prompt: Prompt, trajectory: Trajectory, tokenizer: Any) -> Score:
    for _ in range(trajectory.num_tokens % 3):
        await asyncio.sleep(0)
    return Score(float(trajectory.num_tokens), True, "")


class Tokenizer:
    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(str, token_ids))


async def part(request: GroupRequest, engine: Ticking, ticks: int, pushes: int, make_env: Any = SingleTurn) -> Any:
    """The group, or what there is of it after so many turns of the loop; weights change every `pushes` of them."""
    way = GroupUnderWay(request)
    task = asyncio.ensure_future(
        run_group(request, make_env=make_env, sampler=engine, reward=graded, tokenizer=Tokenizer(), under_way=way)  # type: ignore[arg-type]
    )
    for tick in range(ticks):
        await asyncio.sleep(0)
        engine.version += tick % pushes == pushes - 1
    if not task.done():
        begun = way.begun(engine.drawn())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return begun
    return task.result()


def request(seed: int = 3) -> GroupRequest:
    return GroupRequest(0, PROMPT, SIZE, Sampling(BUDGET, 1.0, 1.0, (), seed))


@bounded(150)
@given(seed=st.integers(0, 2**40), stops=st.lists(st.integers(0, 14), max_size=4), pushes=st.integers(1, 9))
def test_what_was_drawn_stays_whenever_it_is_broken_off(seed, stops, pushes):
    order, version, before = request(seed), 0, None
    for ticks in [*stops, 100]:
        engine = Ticking(version)
        found = asyncio.run(part(order, engine, ticks, pushes))
        version = engine.version + 1
        for prompt, left, _ in engine.asked:
            assert prompt[:2] == PROMPT.token_ids
            assert len(prompt) - 2 + left == BUDGET
        if isinstance(found, Group):
            break
        for old, new in ((before, found),) if before else ():
            assert {g.sample for g in old.graded} <= {g.sample for g in new.graded}
            kept = {p.sample: p.drawn for p in new.partial} | {g.sample: None for g in new.graded}
            assert {p.sample for p in old.partial} <= kept.keys()
        before, order = found, dataclasses.replace(order, begun=found)
    assert isinstance(found, Group)
    assert [t.sample for t in found.trajectories] == list(range(SIZE))
    for trajectory in found.trajectories:
        prompt, action = trajectory.spans
        tokens = action.token_ids.tolist()
        versions = np.repeat([v for v, _ in action.versions], [n for _, n in action.versions])
        assert prompt.token_ids.tolist() == [5, 6]
        assert action.logprobs.tolist() == [told(t, v) for t, v in zip(tokens, versions, strict=True)]
        assert list(versions) == sorted(versions)
        assert len({v for v, _ in action.versions}) == len(action.versions)
        assert EOS not in tokens[:-1]
        assert trajectory.status is (Status.COMPLETED if tokens[-1] == EOS else Status.TRUNCATED)
        assert len(tokens) == BUDGET or tokens[-1] == EOS
        assert trajectory.weight_versions == (versions[0], versions[-1])
    for of in before.partial if before else ():
        (action,) = found.trajectories[of.sample].spans[1:]
        n = len(of.drawn.token_ids)
        assert action.token_ids[:n].tolist() == of.drawn.token_ids.tolist()
        assert action.logprobs[:n].tolist() == of.drawn.logprobs.tolist()
        assert not of.ended or len(action.token_ids) == n
    for of in before.graded if before else ():
        assert found.trajectories[of.sample] is of.trajectory
        assert found.scores[of.sample] is of.score


class TwoTurns(SingleTurn):
    """Answers the first turn with a token."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(prompt)
        self._answered = False

    async def step(self, action: Completion) -> Any:
        first, self._answered = not self._answered, True
        return np.array([9], np.int32) if first else End(Status.COMPLETED)


class Other(SingleTurn):
    """Begins with another prompt each time."""

    async def reset(self) -> Any:
        return np.array([5, random.randrange(10, 10**6)], np.int32)


def test_later_turns_start_again():
    """Of eight samples some are in their first turn, some in their second; each ends as two turns do."""
    order = dataclasses.replace(request(8), group_size=8)
    begun = asyncio.run(part(order, Ticking(0), 7, 100, TwoTurns))
    first = {of.sample for of in (*begun.partial, *begun.graded)}
    assert begun.partial
    assert len(first) < 8
    engine = Ticking(1)
    group = asyncio.run(part(dataclasses.replace(order, begun=begun), engine, 100, 100, TwoTurns))
    for trajectory in group.trajectories:
        assert (trajectory.versions()[2] == 0) == (trajectory.sample in first)
    # Who starts again asks with the prompt alone and all of the budget.
    assert sum(left == BUDGET for _, left, _ in engine.asked) == 8 - len(first)


def test_an_environment_that_begins_otherwise_starts_again():
    begun = asyncio.run(part(request(), Ticking(0), 4, 100, Other))
    assert begun.partial
    engine = Ticking(1)
    group = asyncio.run(part(dataclasses.replace(request(), begun=begun), engine, 100, 100, Other))
    again = [t for t in group.trajectories if t.sample in {p.sample for p in begun.partial}]
    assert all(t.weight_versions == (1, 1) for t in again)


def test_a_turn_that_was_over_is_not_drawn_again():
    """Its grading was interrupted, or a tool call."""
    drawn = completion([(3, 0), (EOS, 0)], Status.COMPLETED)
    before = Partial(0, np.array([5, 6], np.int32), drawn, ended=True)
    engine = Ticking(1)
    turn = FirstTurn(engine, 0, before, str)
    assert asyncio.run(turn.sample((5, 6), Sampling(BUDGET, 1.0, 1.0, (), 1))) is drawn
    assert not engine.asked
    kept = turn.partial({})
    assert kept is not None
    assert kept.ended


@bounded(300)
@given(
    text=st.text("abé", min_size=1, max_size=14),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=2),
    data=st.data(),
)
def test_a_stop_string_that_began_before_the_break_ends_it_too(text, stop, data):
    """Tokens are bytes, so that a break may be within a character. An engine sees what it is asked to draw alone."""
    script = list(text.encode())

    def engine(first: int) -> Completion:
        """The script from a token on, up to a stop string that begins there."""
        for end in range(first + 1, len(script) + 1):
            if any(s in decode(script[first:end]) for s in stop):
                return of(script[first:end], Status.COMPLETED)
        return of(script[first:], Status.TRUNCATED)

    def of(tokens: list[int], status: Status) -> Completion:
        return Completion(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), status, 4)

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    whole = engine(0)
    broken = data.draw(st.integers(0, len(whole.token_ids) - 1))
    rest = engine(broken)
    both = of([*script[:broken], *rest.token_ids.tolist()], rest.status)
    made = stopped(both, broken, stop, decode)
    assert made.token_ids.tolist() == whole.token_ids.tolist()
    assert made.status is whole.status
    assert len(made.logprobs) == len(made.token_ids)
    assert sum(n for _, n in made.versions) in (0, len(made.token_ids))


@pytest.mark.parametrize("first", [1, 2, 3])
def test_versions_are_cut_with_the_tokens(first):
    runs = ((3, 2), (4, 3))
    whole = Completion(np.arange(97, 102, dtype=np.int32), np.zeros(5, np.float32), Status.TRUNCATED, 3, versions=runs)
    made = stopped(whole, first, ["abcd"], lambda ids: "".join(map(chr, ids)))
    assert made.token_ids.tolist() == [97, 98, 99, 100]
    assert made.versions == ((3, 2), (4, 2))
    assert made.status is Status.COMPLETED
