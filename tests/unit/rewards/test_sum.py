"""Weighted sums of rewards: what counts, what is reported, what is not graded."""

from __future__ import annotations

import asyncio
import pickle
import tomllib

import pytest

from stare_megatron import config
from stare_megatron.checkpoint import settings as kept
from stare_megatron.errors import UserError
from stare_megatron.metrics import catalogue
from stare_megatron.rewards import RewardError, check_prompts, make_reward
from stare_megatron.run.folder import to_toml
from stare_megatron.types import Measured
from tests.unit.rewards.test_rewards import PROMPT, Text, written

OWN = """
from pydantic import Field
from stare_megatron.config import Section
from stare_megatron.rewards import RewardError, RewardKind, text_reward
from stare_megatron.types import Measured, Score


class Settings(Section):
    value: float = Field(default=0.25, le=9, description="What it says.")


def says(prompt, text, settings):
    return Score(settings.value, False, "as told", measured=(Measured("user/sum/asked", 1),))


SAYS = text_reward(says, Settings, columns=("rubric",))


async def silent(prompt, trajectory, tokenizer):
    raise RewardError("nobody there")


async def broken(prompt, trajectory, tokenizer):
    raise ZeroDivisionError


def whole(prompt):
    if not prompt.answer.isdigit():
        raise ValueError("no whole number")


WHOLE = RewardKind(make=lambda settings: silent, check=whole)
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def made(*parts, **sum_keys) -> config.Config:
    reward = {"name": "sum", "parts": [{"name": p} if isinstance(p, str) else p for p in parts], **sum_keys}
    tree = {"run": {"steps": 1}, "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}, "reward": reward}
    return config.parse(tree, "test")


def scored(text, *parts, **sum_keys):
    return asyncio.run(make_reward(made(*parts, **sum_keys).reward)(PROMPT, written("1"), Text(text)))


BOXED = {"name": "format", "boxed": True, "weight": 0.5}
SAYS = {"name": "own.py:SAYS", "value": 2.0, "weight": -0.25}


def test_parts_are_weighed_and_added_and_each_is_measured():
    parts = ("exact", BOXED, SAYS)
    score = scored(r"so \boxed{30}", *parts)
    assert (score.reward, score.correct, score.graded) == (1.0 + 0.5 - 0.5, True, True)
    assert score.note == "exact 1, format 1, SAYS 2 (as told)"
    assert score.measured == (
        Measured("user/sum/asked", 1),
        Measured("reward/part/exact", 1.0),
        Measured("reward/part/format", 1.0),
        Measured("reward/part/SAYS", 2.0),
    )
    assert [catalogue.entry(m.name).unit for m in score.measured[1:]] == ["reward"] * 3
    assert scored("31", *parts).reward == -0.5
    assert scored("31", *parts[:2], SAYS | {"weight": 3}).reward == 6.0


def test_who_says_what_is_correct():
    labelled = BOXED | {"label": "form"}
    assert not scored("30", labelled, "exact").correct
    assert scored("30", labelled, "exact", correct="exact").correct
    assert scored(r"\boxed{31}", labelled, "exact").correct


def test_a_part_that_cannot_grade_leaves_all_ungraded_unless_it_is_only_reported():
    silent = {"name": "own.py:silent", "label": "judge"}
    with pytest.raises(RewardError, match="judge: nobody there"):
        scored("30", "exact", silent)
    with pytest.raises(RewardError, match="judge: nobody there"):
        scored("30", silent | {"weight": 0}, "exact")  # the first decides what is correct
    score = scored("30", "exact", silent | {"weight": 0})
    assert (score.reward, score.note) == (1.0, "exact 1")
    assert [m.name for m in score.measured] == ["reward/part/exact"]


def test_a_bug_in_a_part_ends_the_run():
    with pytest.raises(ZeroDivisionError):
        scored("30", "exact", "own.py:broken")


def test_columns_files_and_checks_are_those_of_the_parts():
    whole = made("exact", SAYS, "own.py:WHOLE")
    assert whole.data.extra_keys == ["rubric"]
    assert list(whole.own_files()) == ["reward.parts.SAYS", "reward.parts.WHOLE"]
    check_prompts(whole.reward, [PROMPT], "t.jsonl")
    with pytest.raises(UserError, match=r"t.jsonl: prompt 'p': reward.name = 'sum' .* part 'WHOLE': no whole number"):
        check_prompts(whole.reward, [PROMPT.__class__("p", "s", "q", (1,), "x")], "t.jsonl")


def test_it_can_be_written_read_and_sent():
    whole = made("exact", BOXED, SAYS, correct="exact")
    assert config.parse(tomllib.loads(to_toml(whole)), "test") == whole
    assert pickle.loads(pickle.dumps(whole)) == whole


def test_a_part_of_another_form_is_another_run(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    kept.write(tmp_path, kept.settings_of(made("exact", SAYS)))
    kept.check_settings(tmp_path, kept.settings_of(made("exact", SAYS)), [])
    with pytest.raises(UserError, match=r"reward\.parts was"):
        kept.check_settings(tmp_path, kept.settings_of(made("exact", SAYS | {"value": 3.0})), [])
    (tmp_path / "own.py").write_text(OWN + "\n# changed\n")
    with pytest.raises(UserError, match=r'the file of reward.parts.SAYS has changed.*resume_allow=\["reward.parts.SA'):
        kept.check_settings(tmp_path, kept.settings_of(made("exact", SAYS)), [])
    kept.check_settings(tmp_path, kept.settings_of(made("exact", SAYS)), ["reward.parts.SAYS"])


@pytest.mark.parametrize(
    ("parts", "more", "words"),
    [
        ([], {}, "reward.parts = .*must have at least 1 entry"),
        (["sum"], {}, "reward.parts.name = 'sum' is not registered"),
        (["exakt"], {}, r"reward.parts.name = 'exakt' is not registered \(did you mean 'exact'\?\)"),
        (["exact", "exact"], {}, "two parts are called 'exact'"),
        (["exact"], {"correct": "math"}, "correct = 'math' is the label of no part; they are exact"),
        ([{"name": "exact", "weight": 0}], {}, "every part has the weight 0"),
        ([{"name": "exact", "label": "a/b"}], {}, "reward.parts.label = 'a/b'"),
        ([{"name": "exact", "boxed": True}], {}, 'boxed is not used by name = "exact"; set name = "format"'),
        ([{"name": "format"}], {}, "a format without a demand"),
    ],
)
def test_refused_at_the_door(parts, more, words):
    with pytest.raises(UserError, match=words):
        made(*parts, **more)
