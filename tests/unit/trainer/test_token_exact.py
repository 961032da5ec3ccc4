"""A thousand random episodes with Qwen's tokenizer: what is trained on is what the sampler saw, token by token."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random

import numpy as np
import pytest
import torch
from tokenizers.decoders import DecodeStream

from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.config import AlgorithmConfig, TrainerConfig
from stare_megatron.config.env import ToolUseConfig
from stare_megatron.data.packing import plan_updates
from stare_megatron.envs.tool_use import ToolUse
from stare_megatron.rollout.episode import run_group
from stare_megatron.sandbox.result import Result
from stare_megatron.sandbox.result import Status as Outcome
from stare_megatron.trainer.sequence import token_batch
from stare_megatron.types import Completion, GroupRequest, Prompt, Sampling, Score, SequenceCost, SpanKind, Status
from tests import qwen_tokenizer

SIZE = 4
SPECIAL = ["<|im_end|>", "<|im_start|>user\n", "</tool_response>", "<tool_call>", "</code>", "<|endoftext|>"]
WORDS = ["so", " the", "\n", " 12", "é", "漢", "🙂", " <", "```", "\t", " x", "\n\n", "`", "</", ">"]


class Box:
    """Answers with noise that tries to be part of the form."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = 0.0) -> Result:
        await asyncio.sleep(0)
        text = "".join(self._rng.choices([*WORDS, *SPECIAL], k=self._rng.choice([0, 5, 20, 300])))
        return Result(self._rng.choice([Outcome.OK, Outcome.ERROR]), text, "", "", 0, 1.0, 2.0)

    @contextlib.asynccontextmanager
    async def session(self):
        yield self

    async def check(self) -> bool:
        return True


class Sampler:
    """Draws tokens from the whole vocabulary and calls in any spelling, and stops as an engine does: with the token
    that completes a stop string, or with the end of sequence."""

    version = 3

    def __init__(self, tokenizer, call, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._call = call
        self._rng = rng
        self.asked: dict[int, list[tuple[list[int], list[int], list[float]]]] = {}

    async def sample(self, token_ids, sampling) -> Completion:
        await asyncio.sleep(0)
        drawn = self._until_stop(self._draw(), sampling)
        eos = self._tokenizer.eos_token_id
        cut = len(drawn) > sampling.max_tokens
        drawn = drawn[: sampling.max_tokens]
        logprobs = [-self._rng.random() for _ in drawn]
        # The sample's number is the prompt's first token.
        self.asked.setdefault(token_ids[0], []).append((list(token_ids), drawn, logprobs))
        stopped = drawn[-1] == eos or not cut
        status = Status.COMPLETED if stopped else Status.TRUNCATED
        return Completion(np.array(drawn, np.int32), np.array(logprobs, np.float32), status, self.version)

    def _draw(self) -> list[int]:
        eos, rng = self._tokenizer.eos_token_id, self._rng
        noise = [t for t in rng.choices(range(len(self._tokenizer)), k=rng.randrange(12)) if t != eos]
        if rng.random() < 0.25:
            return [*noise, eos]
        text = self._call(rng) + rng.choice(["", "\n", "\n\n", " ", " and", "()"])
        return noise + self._spell(text) + self._spell("".join(rng.choices(WORDS, k=3))) + [eos]

    def _spell(self, text: str) -> list[int]:
        """Tokens of the text, cut at random places: most spellings are not the tokenizer's own."""
        cuts = sorted(self._rng.sample(range(1, len(text)), min(self._rng.randrange(5), len(text) - 1)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        return [t for piece in pieces for t in self._tokenizer.encode(piece, add_special_tokens=False)]

    def _until_stop(self, drawn: list[int], sampling: Sampling) -> list[int]:
        stream, text = DecodeStream(skip_special_tokens=False), ""
        for i, token in enumerate(drawn):
            text += stream.step(self._tokenizer.backend_tokenizer, token) or ""
            if any(stop in text for stop in sampling.stop):
                return drawn[: i + 1]
        return drawn


def hermes_call(rng: random.Random) -> str:
    body = json.dumps({"name": rng.choice(["python", "python", "ruby"]), "arguments": {"code": f"{rng.random()} é"}})
    return f"<tool_call>{rng.choice(['', chr(10)])}{body if rng.random() < 0.8 else body[:-3]}\n</tool_call>"


def retool_call(rng: random.Random) -> str:
    return f"<code>\n```python\nprint({rng.random()})\n```\n</code>" if rng.random() < 0.8 else " </code>"


def fenced_call(rng: random.Random) -> str:
    return f"\n```{rng.choice(['python', 'python', '', 'text'])}\nprint({rng.random()})\n```\n"


async def reward(prompt, trajectory, tokenizer) -> Score:
    return Score(float(trajectory.num_action_tokens % 3), False, "")


@pytest.mark.parametrize(
    ("parser", "call", "groups"),
    [("hermes", hermes_call, 84), ("retool", retool_call, 83), ("fenced", fenced_call, 83)],
)
def test_trained_tokens_are_the_sampled_ones(parser, call, groups):
    tokenizer = qwen_tokenizer.load()
    config = ToolUseConfig(parser=parser, max_observation_tokens=60, max_turns=6)
    rng = random.Random(parser)
    seen: list[Status] = []
    respelt = 0
    for number in range(groups):
        sampler = Sampler(tokenizer, call, rng)
        first = itertools.count(1000 * (number + 1))

        def make(prompt, first=first):
            own = Prompt(prompt.id, prompt.source, prompt.text, (next(first), *prompt.token_ids), prompt.answer)
            return ToolUse(own, Box(rng), tokenizer, config)

        request = GroupRequest(
            0, Prompt("p", "s", "q", (5, 6, 7), ""), SIZE, Sampling(rng.choice([120, 700]), 1.0, 1.0, (), 0)
        )
        group = asyncio.run(run_group(request, make_env=make, sampler=sampler, reward=reward, tokenizer=tokenizer))
        for trajectory in group.trajectories:
            asked = sampler.asked[int(trajectory.token_ids()[0])]
            check_stream(trajectory, asked, tokenizer, config)
            seen.append(trajectory.status)
            ids = trajectory.token_ids().tolist()
            respelt += tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids
        check_batch(group)
    assert len(seen) == groups * SIZE
    # No token of this vocabulary goes on past the fence and its line's end.
    assert set(seen) == {Status.COMPLETED, Status.TRUNCATED} | ({Status.INEXACT} if parser != "fenced" else set())
    assert seen.count(Status.COMPLETED) > len(seen) / 5
    assert respelt > len(seen) / 2  # a loop that encoded the text again would train on other tokens


def check_stream(trajectory, asked, tokenizer, config) -> None:
    ids = trajectory.token_ids().tolist()
    prompt, drawn, _ = asked[-1]
    assert ids[: len(prompt) + len(drawn)] == prompt + drawn == ids
    for (before, written, _), (after, _, _) in itertools.pairwise(asked):
        assert after[: len(before) + len(written)] == before + written
    actions = [s for s in trajectory.spans if s.kind is SpanKind.ACTION]
    assert [s.token_ids.tolist() for s in actions] == [written for _, written, _ in asked]
    for span, (_, _, logprobs) in zip(actions, asked, strict=True):
        np.testing.assert_array_equal(span.logprobs, np.array(logprobs, np.float32))
    at = 0
    for span in trajectory.spans:
        if span.kind is SpanKind.OBSERVATION:
            check_observation(span.token_ids.tolist(), ids[at - 1], tokenizer, config)
        at += len(span.token_ids)
    assert len(trajectory.turns) <= len(actions)


def check_observation(tokens, before, tokenizer, config) -> None:
    """Only the form's own special tokens, however hard the tool tried."""
    added = set(tokenizer.get_added_vocab().values())
    found = [t for t in tokens if t in added]
    if config.parser == "hermes":
        start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
        assert found == [end] * (before != end) + [start, end, start]
        assert tokenizer.decode(tokens).endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")
    else:
        assert found == []
    assert len(tokens) <= config.max_observation_tokens + 24


def check_batch(group) -> None:
    kept = [t for t in group.trajectories if t.status.is_trainable and t.num_action_tokens]
    if not kept:
        return
    ((share,),) = plan_updates([group.summary()], TrainerConfig(micro_batch_tokens=256), SequenceCost(1.0, 0.0))
    batch = token_batch([group], share, ALGORITHMS["grpo"], AlgorithmConfig(), torch.device("cpu"))
    assert batch.token_ids_T.tolist() == [token for t in kept for token in t.token_ids().tolist()]
    assert batch.action_T.tolist() == [action for t in kept for action in t.action_mask().tolist()]
    assert batch.rollout_logprob_T.tolist() == [x for t in kept for x in t.rollout_logprobs().tolist()]
    assert batch.num_action_tokens == share.num_action_tokens == sum(t.num_action_tokens for t in kept)
    assert batch.advantage_T[~batch.action_T].eq(0).all()
