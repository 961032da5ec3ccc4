"""Multi-turn episodes on a real engine with Qwen's vocabulary, trained on by a Megatron-Core rank."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import launch
from transformers import Qwen2Config, Qwen2ForCausalLM

from stare_megatron.config import InferenceConfig, parse
from stare_megatron.rollout.groups import Runner
from stare_megatron.sandbox.result import Result
from stare_megatron.sandbox.result import Status as Outcome
from stare_megatron.types import Completion, Group, GroupRequest, Prompt, Sampling, SpanKind, Status
from tests import qwen_tokenizer
from tests.e2e.engine_process import EngineProcess, started

VOCAB = 151_936
WINDOW = 320
RESPONSE = 280
GROUPS, SIZE = 6, 4
# Probabilities of some tokens, so that a random model calls, and now and then ends.
LIKELY = {"</tool_call>": 0.12, "<tool_call>": 0.03, "<|im_end|>": 0.01, "{": 0.03, " é": 0.05}

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 that prefers some tokens: the first hidden dimension is the same large number everywhere, and the
    output weights of that dimension act as a bias."""
    tokenizer = qwen_tokenizer.load()
    folder = tmp_path_factory.mktemp("qwen") / "model"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            max_position_embeddings=512,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            dtype=torch.float32,
        )
    )
    with torch.no_grad():
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, 0] = 4.0
        output[:, 0] = 0.0
        hidden = model.model(torch.randint(0, VOCAB, (1, 200))).last_hidden_state[0]
        rest = float((hidden @ output.T).logsumexp(-1).mean())
        for text, share in LIKELY.items():
            (token,) = tokenizer.encode(text, add_special_tokens=False)
            output[token, 0] = (rest + math.log(share / (1 - sum(LIKELY.values())))) / hidden[:, 0].mean()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[EngineProcess]:
    with started(checkpoint, InferenceConfig(), WINDOW, 600) as process:
        yield process


class Recorder:
    """The engine as a sampler, which remembers what went in and came out, by the seed of the episode's first turn."""

    version = -1

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self.asked: list[tuple[list[int], Completion]] = []

    async def sample(self, token_ids, sampling: Sampling) -> Completion:
        prompt = list(token_ids)
        completion = await asyncio.wrap_future(self._engine.submit("sample", prompt, sampling))
        self.asked.append((prompt, completion))
        return completion

    def turns(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """The requests of the episode whose stream is `ids`, in order."""
        found = [(p, c.token_ids.tolist()) for p, c in self.asked if ids[: len(p)] == p]
        return sorted((t for t in found if ids[: len(t[0]) + len(t[1])] == t[0] + t[1]), key=lambda t: len(t[0]))


class Box:
    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = 0.0) -> Result:
        return Result(Outcome.OK, "<|im_end|> 4\n", "", "", 0, 1.0, 1.0)

    @contextlib.asynccontextmanager
    async def session(self):
        yield self

    async def check(self) -> bool:
        return True


def play(checkpoint: Path, recorder: Recorder) -> list[Group]:
    tree = {
        "run": {"steps": 1},
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "data": {"train": ["none"], "max_prompt_tokens": 32},
        "reward": {"name": "exact"},
        "rollout": {"max_response_tokens": RESPONSE},
        "env": {"name": "tool_use", "max_turns": 6, "max_observation_tokens": 24},
    }
    run = Runner(parse(tree, "test"), recorder, Box())
    rng = np.random.default_rng(0)

    async def several() -> list[Group]:
        requests = []
        for i in range(GROUPS):
            prompt = Prompt(f"p{i}", "s", "", tuple(int(t) for t in rng.integers(0, 1000, 8)), "4")
            requests.append(GroupRequest(i, prompt, SIZE, Sampling(RESPONSE, 1.0, 1.0, (), seed=100 + i)))
        return [group for group, _ in await asyncio.gather(*map(run, requests))]

    return asyncio.run(several())


def with_rewards(groups: list[Group]) -> list[Group]:
    """No random model is right: scores that give every trajectory an advantage."""
    return [
        Group(g.prompt, g.trajectories, tuple(type(s)(float(i % 2), False, "") for i, s in enumerate(g.scores)))
        for g in groups
    ]


def test_trained_tokens_and_logprobs_are_the_engines(checkpoint: Path, engine: EngineProcess) -> None:
    recorder = Recorder(engine)
    groups = with_rewards(play(checkpoint, recorder))
    trajectories = [t for g in groups for t in g.trajectories]
    calls = sum(t.counts().calls for t in trajectories)
    assert calls > len(trajectories)  # several turns each
    assert sum(t.counts().turns for t in trajectories) == len(recorder.asked)
    assert {Status.COMPLETED, Status.TRUNCATED} & {t.status for t in trajectories}
    for trajectory in trajectories:
        ids = trajectory.token_ids().tolist()
        turns = recorder.turns(ids)
        actions = [s.token_ids.tolist() for s in trajectory.spans if s.kind is SpanKind.ACTION]
        assert [written for _, written in turns] == actions
        assert turns[-1][0] + turns[-1][1] == ids
        for (before, written), (after, _) in itertools.pairwise(turns):
            assert after[: len(before) + len(written)] == before + written

    rollout = {"prompts_per_step": GROUPS, "group_size": SIZE, "max_response_tokens": RESPONSE}
    arguments = {"checkpoint": checkpoint, "groups": groups, "overrides": {"rollout": rollout}}
    (trained,) = launch("tool_use_worker:train", 1, arguments, timeout=600)
    kept = [t for t in trajectories if t.status.is_trainable]
    assert len(kept) > 0.9 * len(trajectories)
    assert sorted(trained["tokens"]) == sorted(t.token_ids().tolist() for t in kept)
    assert sorted(trained["actions"]) == sorted(t.action_mask().tolist() for t in kept)
    for trajectory in kept:
        action = trajectory.action_mask()
        ours = np.concatenate([[0.0], trained["logprobs"][trajectory.prompt_id, trajectory.sample]])
        np.testing.assert_allclose(ours[action], trajectory.rollout_logprobs()[action], atol=1e-3)
    assert trained["scores"].num_action_tokens == sum(t.num_action_tokens for t in kept)
    assert trained["scores"]["mismatch/max"] < 1e-3
