"""The form and the length of a response."""

from __future__ import annotations

import asyncio
import time

import pytest

from stare_megatron.config import RewardConfig
from stare_megatron.errors import UserError
from stare_megatron.rewards import RewardError, make_reward
from stare_megatron.rewards.response_format import tags_fault
from stare_megatron.types import SpanKind
from tests.unit.rewards.test_rewards import PROMPT, Text, trajectory, written

R1 = ["think", "answer"]


def scored(text, **settings):
    async def main():
        reward = make_reward(RewardConfig.model_validate({"name": "format", **settings}))
        try:
            return await reward(PROMPT, written("1"), Text(text))
        finally:
            await reward.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<think>3 + 4</think><answer>7</answer>", ""),
        ("\n<think>\n3 + 4\n</think>\n\n<answer>7</answer>\n", ""),
        ("<think>a < b > c </i></think><answer>7</answer>", ""),
        ("<think>3</think>", "want <think></think><answer></answer>, found '<think></think>'"),
        ("<answer>7</answer><think>3</think>", "found '<answer></answer><think></think>'"),
        ("<think>3</think><think>4</think><answer>7</answer>", "found"),
        ("<think>3</think><answer>7</answer><answer>8</answer>", "found"),
        ("<think> \n</think><answer>7</answer>", "<think> is empty"),
        ("<think>3</think><answer></answer>", "<answer> is empty"),
        ("well <think>3</think><answer>7</answer>", "text outside the tags: 'well'"),
        ("<think>3</think> so <answer>7</answer>", "text outside the tags: 'so'"),
        ("<think>3</think><answer>7</answer> done", "text outside the tags: 'done'"),
        ("", "found ''"),
        ("<think>" * 100000, "found"),
    ],
)
def test_tags(text, fault):
    said = tags_fault(R1, text)
    assert fault in said
    assert bool(said) is bool(fault)
    assert scored(text, tags=R1).correct is not bool(fault)


def test_all_demands_count():
    good = r"<think>3</think><answer>\boxed{7}</answer>"
    both = {"tags": R1, "boxed": True, "pattern": r"<think>\d.*"}
    score = scored(good, **both)
    assert (score.reward, score.correct, score.note) == (1.0, True, "")
    assert scored(good.replace("boxed", "box"), **both).note == "no answer in a box"
    assert scored(good.replace("3", "x"), **both).note == "does not match the pattern"
    assert scored(good, pattern="<think>").reward == 0.0  # the whole response
    assert scored("3</think>\n<answer>7</answer>", tags=R1, prefix="<think>").correct
    assert scored(r"\boxed{ }", boxed=True).reward == 0.0


@pytest.mark.parts
def test_a_pattern_that_takes_for_ever_is_not_graded():
    began = time.monotonic()
    with pytest.raises(RewardError, match="no answer within 5 s"):
        scored("a" * 60 + "!", pattern="(a+)+b")
    assert time.monotonic() - began < 120


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "a format without a demand"),
        ({"pattern": "("}, r"pattern = '\(' is no regular expression"),
        ({"tags": ["<think>"]}, "tags holds '<think>'; want names without brackets"),
    ],
)
def test_a_format_that_cannot_be_is_refused(settings, words):
    with pytest.raises((UserError, ValueError), match=words):
        RewardConfig.model_validate({"name": "format", **settings})


def test_soft_overlong_punishment():
    def punished(tokens, limit=100, buffer=20):
        reward = make_reward(RewardConfig.model_validate({"name": "length", "limit": limit, "buffer": buffer}))
        score = asyncio.run(reward(PROMPT, trajectory((SpanKind.ACTION, [5] * tokens)), Text("")))
        assert score.correct is (score.reward == 0.0)
        return score.reward

    assert [punished(n) for n in (1, 80, 81, 90, 99, 100, 500)] == [0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0]
    assert [punished(n, buffer=0) for n in (99, 100, 101)] == [0.0, -1.0, -1.0]
    with pytest.raises(ValueError, match="buffer = 7 is more than limit = 5"):
        punished(1, limit=5, buffer=7)
