"""What `[env]` and `[rollout]` make of a runner's groups."""

from __future__ import annotations

import asyncio
import contextlib
import json

import numpy as np
import pytest

from stare_megatron.config import parse
from stare_megatron.inference.awake import AwakeClock
from stare_megatron.rollout.groups import Runner, check_env
from stare_megatron.run.folder import to_toml
from stare_megatron.sandbox.result import Result
from stare_megatron.sandbox.result import Status as Outcome
from stare_megatron.types import Completion, GroupRequest, Prompt, Sampling, Status
from tests import byte_tokenizer

TOKENIZER = byte_tokenizer.make()
CALL = '<tool_call>{"name": "python", "arguments": {"code": "2 + 2"}}</tool_call>'


class Box:
    async def run(self, code, stdin="", *, echo=False, seconds=0.0):
        return Result(Outcome.OK, "", "", "4", 0, 1.0, 1.0)

    @contextlib.asynccontextmanager
    async def session(self):
        yield self

    async def check(self):
        return True


class Sampler:
    """Calls once and answers; the group's second sample says something else, its third calls until it is stopped."""

    version = 1

    async def sample(self, token_ids, sampling):
        text = TOKENIZER.decode(token_ids)
        if "4\n</tool_response>" in text and "loop" not in text:
            said = "It is 4<|im_end|>"
        else:
            kind = sampling.seed % 3
            said = "who knows?<|im_end|>" if kind == 0 else f"{'loop' if kind == 1 else ''}{CALL}"
        ids = np.array(TOKENIZER.encode(said), np.int32)
        return Completion(ids, np.zeros(len(ids), np.float32), Status.COMPLETED, 1)


def config(folder, **tables):
    tree = {
        "run": {"steps": 1},
        "model": {"path": str(folder)},
        "data": {"train": ["p"]},
        "reward": {"name": "exact"},
        "env": {"name": "tool_use", "max_turns": 2, "final_answer": r"\d"},
    }
    for name, values in tables.items():
        tree[name] = tree.get(name, {}) | values
    return parse(tree, "test")


@pytest.fixture
def folder(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(TOKENIZER)}))
    return tmp_path


def statuses(made):
    run = Runner(made, Sampler(), Box())
    request = GroupRequest(0, Prompt("p", "s", "q", (40, 41), "4"), 12, Sampling(900, 1.0, 1.0, (), 5))
    _, summary = asyncio.run(run(request))
    seen = {"answered": set(), "void": set(), "looped": set()}
    for status, counts in zip(summary.statuses, summary.episodes, strict=True):
        kind = "void" if counts.void else "looped" if status.is_truncated else "answered"
        seen[kind].add((status, counts.turns, counts.calls))
    return seen, summary


def test_settings_reach_the_episodes(folder):
    seen, summary = statuses(config(folder))
    assert seen == {
        "answered": {(Status.COMPLETED, 2, 1)},
        "void": {(Status.COMPLETED, 1, 0)},
        "looped": {(Status.TRUNCATED, 2, 1)},
    }
    assert sum(summary.correct) >= 1
    masked, again = statuses(config(folder, rollout={"overlong": "mask"}, env={"void_turns": "mask"}))
    assert masked == {
        "answered": {(Status.COMPLETED, 2, 1)},
        "void": {(Status.VOID, 1, 0)},
        "looped": {(Status.OVERLONG, 2, 1)},
    }
    assert again.rewards == summary.rewards  # graded all the same
    assert not summary.zero_variance
    assert again.zero_variance  # only right answers are left to learn from


@pytest.mark.parametrize("asleep", [True, False])
def test_time_in_which_the_engine_sleeps_does_not_count(folder, asleep):
    now = 100.0
    clock = AwakeClock(lambda: now)

    class Slow(Sampler):
        async def sample(self, token_ids, sampling):
            nonlocal now
            if asleep:
                clock.stand()
            now += 700
            clock.go()
            return await super().sample(token_ids, sampling)

    run = Runner(config(folder), Slow(), Box(), clock)
    request = GroupRequest(0, Prompt("p", "s", "q", (40, 41), "4"), 12, Sampling(900, 1.0, 1.0, (), 5))
    _, summary = asyncio.run(run(request))
    assert (Status.FAILED in summary.statuses) == (not asleep)  # env.episode_seconds is 600
    assert any(episode.calls for episode in summary.episodes) == asleep


def test_a_tool_needs_a_sandbox_and_one_turn_needs_none(folder):
    with pytest.raises(ValueError, match="needs a sandbox"):
        Runner(config(folder), Sampler())
    plain = config(folder, env={"name": "single_turn", "max_turns": 8, "final_answer": ""})
    check_env(plain.env, byte_tokenizer.make("no template"))
    Runner(plain, Sampler())


def test_a_runs_folder_can_be_read_again(folder):
    import tomllib

    for made in (config(folder), parse(config(folder).model_dump(mode="json", exclude={"env"}), "test")):
        assert parse(tomllib.loads(to_toml(made)), "test") == made
