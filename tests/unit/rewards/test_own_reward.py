"""The rewards of docs/adding_a_reward.md, taken from the page: files in a folder, none in the package."""

from __future__ import annotations

import asyncio
import dataclasses
import tomllib

import pytest

from stare_megatron import config
from stare_megatron.errors import UserError
from stare_megatron.rewards import check_prompts, make_reward
from stare_megatron.rewards.functions import TextReward
from stare_megatron.types import Score
from tests.guide import blocks
from tests.unit.rewards.test_rewards import PROMPT, TOKENIZER, Text, written

TREE = {"run": {"steps": 1}, "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}}


@pytest.fixture
def page(tmp_path, monkeypatch):
    found = blocks("adding_a_reward")
    for name, code in zip(("grade.py", "judge.py", "words.py", "digits.py"), found["python"], strict=True):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return found


def scored(table, text, prompt=PROMPT):
    made = make_reward(config.parse(TREE | {"reward": table}, "page").reward)
    return asyncio.run(made(prompt, written("1"), Text(text)))


def test_a_function(page):
    table = tomllib.loads(page["toml"][0])["reward"]
    assert scored(table, " 30\n") == Score(1.0, True, "")
    assert scored(table, "31") == Score(0.1, False, "")
    assert scored(table, "a long answer that goes on").reward == 0.0


def test_a_coroutine_gets_the_trajectory(page):
    assert scored({"name": "judge.py:judge"}, "it is 30") == Score(1.0, True, "")
    assert scored({"name": "judge.py:judge"}, "no") == Score(0.0, False, "no")


def test_settings_and_columns(page):
    table = tomllib.loads(page["toml"][1])["reward"]
    made = config.parse(TREE | {"reward": table}, "page")
    assert made.data.extra_keys == ["synonyms"]
    prompt = dataclasses.replace(PROMPT, answer="cat", extra={"synonyms": ["Kitten"]})
    assert scored(table, "KITTEN", prompt).correct
    assert not scored(table | {"case": True}, "KITTEN", prompt).correct
    assert scored(table, " ", prompt).reward == -1.0
    assert scored({"name": "words.py:COUNTING"}, "cat", prompt) == Score(1.0, True, "number 1")


@pytest.mark.parametrize(
    ("value", "score"), [(True, Score(1.0, True, "")), (0.99, Score(0.99, False, "")), (2, Score(2.0, True, ""))]
)
def test_a_number_is_a_score(value, score):
    assert asyncio.run(TextReward(lambda prompt, text: value)(PROMPT, written("1"), TOKENIZER)) == score


@pytest.mark.parametrize(("value", "error"), [("1", TypeError), (None, TypeError), (float("nan"), ValueError)])
def test_what_is_no_number_is_a_bug(value, error):
    with pytest.raises(error):
        asyncio.run(TextReward(lambda prompt, text: value)(PROMPT, written("1"), TOKENIZER))


def test_prompts_it_cannot_grade(page):
    reward = config.RewardConfig(name="digits.py:DIGITS")
    check_prompts(reward, [dataclasses.replace(PROMPT, answer="17")], "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl: prompt 'p': .* the answer 'x' is no whole number"):
        check_prompts(reward, [dataclasses.replace(PROMPT, answer="x")], "a.jsonl")
