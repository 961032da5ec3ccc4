"""What a real engine has drawn of requests that are not finished, and another request that goes on from there."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import pytest

from stare_megatron.config import InferenceConfig
from stare_megatron.rollout.under_way import FirstTurn
from stare_megatron.types import Completion, Partial, Sampling, Status
from tests.e2e.engine_process import EngineProcess, started
from tests.e2e.tiny_qwen2 import EOS, make_model, reference_logprobs, save

WINDOW, BUDGET = 512, 480  # of the tiny model
PROMPT = (1, 17, 33, 60)
SEEDS = range(16)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def model():
    return make_model(tied=False, seed=0)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = save(model, tmp_path_factory.mktemp("checkpoint"))
    config = InferenceConfig(vllm={"max_num_batched_tokens": WINDOW, "max_num_seqs": 12})
    with started(folder, config, WINDOW) as process:
        yield process


class Through:
    """The engine of that process as a sampler."""

    def __init__(self, engine: EngineProcess) -> None:
        self.version = -1
        self.asked: list[tuple[int, Sampling]] = []
        self._engine = engine

    async def sample(self, token_ids: Sequence[int], sampling: Sampling) -> Completion:
        self.asked.append((len(token_ids), sampling))
        return await asyncio.wrap_future(self._engine.submit("sample", token_ids, sampling))


def order(seed: int, stop: tuple[str, ...] = ()) -> Sampling:
    return Sampling(BUDGET, 1.0, 1.0, stop, seed)


def test_partial_completions_are_what_was_drawn_and_go_on_exactly(engine: EngineProcess, model) -> None:
    """With and without stop strings, whose requests vLLM decodes as it goes; a few wait and have nothing."""
    stops = {seed: ("nowhere",) if seed % 2 else () for seed in SEEDS}
    running: dict[int, Future[Completion]] = {}
    found: dict[int, Completion] = {}
    deadline = time.monotonic() + 300
    while sum(len(c.token_ids) > 4 for c in found.values()) < 6 and time.monotonic() < deadline:
        if all(future.done() for future in running.values()):  # at once, or this process was late; the same is drawn
            running = {seed: engine.submit("sample", PROMPT, order(seed, stops[seed])) for seed in SEEDS}
        found |= engine.call("drawn")
    whole = {seed: future.result(200) for seed, future in running.items()}
    assert len([c for c in found.values() if len(c.token_ids) > 4]) >= 6
    for seed, drawn in found.items():
        n = len(drawn.token_ids)
        assert 0 < n <= len(whole[seed].token_ids)
        assert drawn.token_ids.tolist() == whole[seed].token_ids[:n].tolist()
        assert drawn.logprobs.tolist() == whole[seed].logprobs[:n].tolist()
        assert drawn.versions == ((-1, n),)
    assert engine.call("drawn") == {}

    async def go_on(seed: int) -> tuple[Completion, Through]:
        through = Through(engine)
        before = Partial(0, np.array(PROMPT, np.int32), found[seed], ended=False)
        turn = FirstTurn(through, 0, before, lambda ids: " ".join(map(str, ids)))
        return await turn.sample(PROMPT, order(seed, stops[seed])), through

    async def all_of() -> list[tuple[Completion, Through]]:
        return await asyncio.gather(*(go_on(seed) for seed in found))

    for seed, (done, through) in zip(found, asyncio.run(all_of()), strict=True):
        n = len(found[seed].token_ids)
        ((asked, sampling),) = through.asked
        assert asked == len(PROMPT) + n
        assert sampling.max_tokens == BUDGET - n
        assert sampling.seed != seed
        assert done.token_ids[:n].tolist() == found[seed].token_ids.tolist()
        assert done.logprobs[:n].tolist() == found[seed].logprobs.tolist()
        assert done.versions == ((-1, len(done.token_ids)),)
        assert EOS not in done.token_ids[:-1]
        assert done.status is (Status.COMPLETED if done.token_ids[-1] == EOS else Status.TRUNCATED)
        assert done.status is Status.COMPLETED or len(done.token_ids) == BUDGET
        want = reference_logprobs(model, [*PROMPT, *done.token_ids.tolist()])[len(PROMPT) - 1 :]
        np.testing.assert_allclose(done.logprobs, want, atol=1e-4)


def test_weights_may_change_between_the_parts(engine: EngineProcess) -> None:
    """The versions of each part are its own; equal neighbours are one stretch."""
    old = Completion(
        np.array([9, 11], np.int32), np.full(2, -0.5, np.float32), Status.TRUNCATED, -3, versions=((-3, 2),)
    )
    before = Partial(0, np.array(PROMPT, np.int32), old, ended=False)
    short = dataclasses.replace(order(3), max_tokens=6)
    done = asyncio.run(FirstTurn(Through(engine), 0, before, str).sample(PROMPT, short))
    assert done.versions == ((-3, 2), (-1, len(done.token_ids) - 2))
    assert done.weight_version == -3
    assert len(done.token_ids) <= 6
