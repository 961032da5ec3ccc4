"""The environment of docs/adding_an_environment.md, taken from the page, through a runner: a file in a folder, none in
the package."""

from __future__ import annotations

import asyncio
import json
import tomllib

import numpy as np
import pytest

from stare_megatron import config
from stare_megatron.envs.base import End
from stare_megatron.rollout.episode import run_episode
from stare_megatron.rollout.groups import Runner, check_env
from stare_megatron.types import Completion, GroupRequest, Prompt, Sampling, SpanKind, Status
from tests import byte_tokenizer
from tests.guide import blocks

TOKENIZER = byte_tokenizer.make()
SAMPLING = Sampling(900, 1.0, 1.0, (), 5)


class Bisecting:
    """Guesses as one should, from what it was told; begins at a number its seed decides."""

    version = 1

    async def sample(self, token_ids, sampling):
        assert sampling.stop == ("\n",)
        said = TOKENIZER.decode(token_ids).split("\n")
        low, high = 0, 64
        for guess, answer in zip(said[1::2], said[2::2], strict=False):
            low, high = (int(guess) + 1, high) if answer == "higher" else (low, int(guess))
        ids = np.array(TOKENIZER.encode(f"{(low + high) // 2}\n"), np.int32)
        return Completion(ids, np.zeros(len(ids), np.float32), Status.COMPLETED, 1)


@pytest.fixture
def made(tmp_path, monkeypatch):
    page = blocks("adding_an_environment")
    (tmp_path / "guess.py").write_text(page["python"][0])
    monkeypatch.chdir(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(TOKENIZER)}))

    def make(**env):
        tree = {"run": {"steps": 1}, "model": {"path": str(tmp_path)}, "data": {"train": ["p"]}}
        table = tomllib.loads(page["toml"][0])["env"] | env
        return config.parse(tree | {"reward": {"name": "exact"}, "env": table}, "page")

    return make


def played(run_config, answer="41"):
    run = Runner(run_config, Bisecting())
    prompt = Prompt("p", "s", "Guess!", tuple(TOKENIZER.encode("Guess!\n")), answer)
    return asyncio.run(run(GroupRequest(0, prompt, 2, SAMPLING)))


def test_the_policy_plays_the_game_of_the_page(made):
    group, summary = played(made())
    assert summary.correct == (True, True)
    assert summary.statuses == (Status.COMPLETED,) * 2
    spans = group.trajectories[0].spans
    text = "".join(TOKENIZER.decode(span.token_ids.tolist()) for span in spans)
    assert text == "Guess!\n32\nhigher\n48\nlower\n40\nhigher\n44\nlower\n42\nlower\n41\n"
    assert [s.kind for s in spans[1::2]] == [SpanKind.ACTION] * 6
    assert summary.episodes[0].turns == 6
    assert summary.episodes[0].calls == 6


def test_its_setting_bounds_it(made):
    _, summary = played(made(guesses=3))
    assert summary.statuses == (Status.TRUNCATED,) * 2
    check_env(made().env, TOKENIZER)


def test_a_status_that_was_not_declared_is_a_bug():
    class Surprising:
        stop = turns = ()

        async def reset(self):
            return np.array([1], np.int32)

        async def step(self, action):
            return End(Status.FAILED)

        async def close(self):
            return None

    class Once:
        version = 1

        async def sample(self, token_ids, sampling):
            return Completion(np.array([5], np.int32), np.zeros(1, np.float32), Status.COMPLETED, 1)

    prompt = Prompt("p", "s", "x", (1,), "1")
    declared = frozenset({Status.COMPLETED, Status.TRUNCATED})
    with pytest.raises(ValueError, match=r"Surprising ended .* Status\.FAILED; its kind's statuses: COMPLETED, TR"):
        asyncio.run(run_episode(prompt, 0, Surprising(), Once(), SAMPLING, declared))
    trajectory, _ = asyncio.run(run_episode(prompt, 0, Surprising(), Once(), SAMPLING))
    assert trajectory.status is Status.FAILED
