"""What users bring is refused before engines start, with what is missing and the page that tells."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stare_megatron.config import Config, parse
from stare_megatron.errors import RunError, UserError
from stare_megatron.rollout.groups import Runner
from stare_megatron.rollout.own import check_own, is_async
from stare_megatron.types import Completion, GroupRequest, Prompt, Sampling, Status
from tests import byte_tokenizer
from tests.configs import tables

TOKENIZER = byte_tokenizer.make()
PROMPT = Prompt("p", "s", "Hi", tuple(TOKENIZER.encode("Hi")), "1")
HEAD = """
import numpy as np
from stare_megatron.envs import End, EnvKind
from stare_megatron.rewards import RewardKind
from stare_megatron.types import Score, Status
"""
ENV = (
    HEAD
    + """
class Mine:
    stop = ()
    turns = ()
    def __init__(self, prompt, context):
        self.ids = np.asarray(prompt.token_ids, np.int32)
    async def reset(self):
        return self.ids
    async def step(self, action):
        return End(Status.COMPLETED)
    async def close(self):
        return None
ENV = EnvKind(make=Mine, needs_sandbox=False)
"""
)
REWARD = (
    HEAD
    + """
class Grader:
    def __init__(self, settings):
        self.settings = settings
    async def __call__(self, prompt, trajectory, tokenizer):
        return Score(1.0, True)
REWARD = RewardKind(make=Grader)
"""
)


def own(folder: Path, env: str = "", reward: str = "", name: str = "REWARD") -> Config:
    """A configuration with the objects of these files."""
    changes: dict[str, dict[str, Any]] = {"reward": {"name": "exact"}}
    if env:
        (folder / "env.py").write_text(env)
        changes["env"] = {"name": f"{folder}/env.py:ENV"}
    if reward:
        (folder / "reward.py").write_text(reward)
        changes["reward"] = {"name": f"{folder}/reward.py:{name}"}
    return parse(tables(**changes), "test")


def test_what_has_all_verbs_is_let_in(tmp_path: Path) -> None:
    check_own(own(tmp_path, ENV, REWARD), TOKENIZER, PROMPT)
    check_own(own(tmp_path), TOKENIZER, PROMPT)


CLOSE = "    async def close(self):\n        return None\n"
ENVS = [
    (ENV.replace(CLOSE, ""), "a Mine has no 'close'; want `async def close"),
    (ENV.replace("async def step", "def step"), "'step' of a Mine is not async; want `async def step"),
    (ENV.replace("async def reset", "def reset"), "'reset' of a Mine is not async"),
    (ENV.replace("step(self, action)", "step(self)"), "'step' of a Mine takes other arguments"),
    (ENV.replace("    stop = ()\n", ""), "a Mine has no 'stop' that is a tuple of texts"),
    (ENV.replace("stop = ()", 'stop = "x"'), "a Mine has no 'stop' that is a tuple of texts"),
    (ENV.replace("    turns = ()\n", ""), "a Mine has no 'turns' that is a tuple of Turn"),
    (ENV.replace("prompt.token_ids", "prompt.ids"), r"make\(prompt, context\) raised AttributeError: .*'ids'"),
    (
        ENV.replace(CLOSE, "").replace("needs_sandbox=False", "needs_sandbox=True"),
        "Mine has no 'close'; want `async def close",
    ),
]


@pytest.mark.parametrize(("text", "says"), ENVS)
def test_an_environment_that_lacks_something_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"env.name = .*env.py:ENV': {says}.*docs/adding_an_environment.md"):
        check_own(own(tmp_path, text), TOKENIZER, PROMPT)


def test_a_class_that_needs_a_sandbox_is_not_built(tmp_path: Path) -> None:
    text = ENV.replace("needs_sandbox=False", "needs_sandbox=True").replace(
        "self.ids =", "context.box.open; self.ids ="
    )
    check_own(own(tmp_path, text), TOKENIZER, PROMPT)


REWARDS = [
    (REWARD.replace("async def __call__", "def __call__"), "a Grader cannot be awaited"),
    (REWARD.replace("__call__", "grade"), "a Grader cannot be awaited"),
    (REWARD.replace("trajectory, tokenizer)", "trajectory)"), "a Grader takes other arguments"),
    (REWARD.replace("self.settings = settings", "settings.words"), r"make\(settings\) raised AttributeError"),
    (REWARD.replace("make=Grader", "make=lambda settings: None"), "a NoneType cannot be awaited"),
    (
        REWARD.replace("async def __call__", "def __call__").replace("make=Grader", "make=Grader, needs_sandbox=True"),
        "Grader cannot be awaited",
    ),
]


@pytest.mark.parametrize(("text", "says"), REWARDS)
def test_a_reward_that_cannot_grade_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"reward.name = .*reward.py:REWARD': {says}.*docs/adding_a_reward.md"):
        check_own(own(tmp_path, reward=text), TOKENIZER, PROMPT)


def test_a_part_of_a_sum_likewise(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(REWARD.replace("async def __call__", "def __call__"))
    parts = [{"name": "exact"}, {"name": f"{tmp_path}/part.py:REWARD", "label": "mine"}]
    with pytest.raises(UserError, match=r"reward.parts 'mine': name = .*part.py:REWARD': a Grader cannot be awaited"):
        check_own(parse(tables(reward={"name": "sum", "parts": parts}), "test"), TOKENIZER, PROMPT)


def test_functions_grade_too(tmp_path: Path) -> None:
    plain = HEAD + "def grade(prompt, text):\n    return 1.0\n"
    check_own(own(tmp_path, reward=plain, name="grade"), TOKENIZER, PROMPT)
    coroutine = HEAD + "async def judge(prompt, trajectory, tokenizer):\n    return Score(1.0, True)\n"
    (tmp_path / "two").mkdir()
    check_own(own(tmp_path / "two", reward=coroutine, name="judge"), TOKENIZER, PROMPT)


def test_a_decorated_or_partial_coroutine_is_async() -> None:
    async def step(self: object, action: object) -> None: ...

    @functools.wraps(step)
    def traced(*args: object) -> object:
        return step(*args)

    class Called:
        async def __call__(self) -> None: ...

    assert is_async(step)
    assert is_async(traced)
    assert is_async(functools.partial(step, None))
    assert is_async(Called())
    assert not is_async(lambda: None)
    assert not is_async(3)


GRADES = [
    ("return 1 / 0", "reward.py:2: ZeroDivisionError: division by zero, for prompt 'p'; mend it; where"),
    ("return None", "TypeError: the reward returned None for prompt p; want a number or a Score, for prompt 'p'"),
    ("return float('nan')", "ValueError: reward must be finite, got nan, for prompt 'p'"),
    ("return prompt.extra['far']", "reward.py:2: KeyError: 'far', for prompt 'p'"),
]


class Answers:
    version = 1

    async def sample(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        ids = np.array(TOKENIZER.encode("4"), np.int32)
        return Completion(ids, np.zeros(len(ids), np.float32), Status.COMPLETED, 1)


def graded(config: Config, folder: Path) -> None:
    """A group of two by the engine's own way, with the tokenizer in `folder`."""
    TOKENIZER.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(TOKENIZER)}))
    model = config.model.model_copy(update={"path": folder})
    run = Runner(config.model_copy(update={"model": model}), Answers())
    asyncio.run(run(GroupRequest(0, PROMPT, 2, Sampling(16, 1.0, 1.0, (), 5))))


@pytest.mark.parametrize(("body", "message"), GRADES, ids=[body for body, _ in GRADES])
def test_a_mistake_in_a_reward_is_told_with_key_line_and_prompt(tmp_path, capfd, body, message):
    config = own(tmp_path, reward=f"def grade(prompt, text):\n    {body}\n", name="grade")
    with pytest.raises(RunError) as e:
        graded(config, tmp_path)
    said = str(e.value)
    assert said.startswith(f"reward.name = '{tmp_path}/reward.py:grade': ")
    assert message in said
    assert "\n" not in said
    assert capfd.readouterr().err.count("Traceback") == 1  # of two samples


def test_a_mistake_in_a_module_has_its_line(tmp_path, monkeypatch):
    (tmp_path / "own_grades.py").write_text("def grade(prompt, text):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = parse(tables(reward={"name": "own_grades:grade"}), "test")
    with pytest.raises(RunError) as e:
        graded(config, tmp_path)
    assert str(e.value).startswith(f"reward.name = 'own_grades:grade': {tmp_path}/own_grades.py:2: ZeroDivisionError: ")


def test_what_an_async_reward_returns_is_a_score(tmp_path):
    code = "async def grade(prompt, trajectory, tokenizer):\n    return 1.0\n"
    with pytest.raises(RunError, match=r"reward\.py:grade': returned 1\.0 for prompt 'p'; want a Score"):
        graded(own(tmp_path, reward=code, name="grade"), tmp_path)


STEPS = [
    ("step", "return 1 / 0", "env.py:{line}: ZeroDivisionError: division by zero, for prompt 'p'; mend it; what an"),
    ("step", "return None", "returned None for prompt 'p'; want tokens, int32 [n], or an End from `step`"),
    ("step", "return [1, 2]", "returned [1, 2] for prompt 'p'; want tokens, int32 [n]"),
    ("step", "return End(Status.INEXACT)", "with a status of its EnvKind (COMPLETED, TRUNCATED)"),
    ("reset", "return self.missing", "env.py:{line}: AttributeError: 'Mine' object has no attribute 'missing', for"),
    ("reset", "return 'Hi'", "returned 'Hi' for prompt 'p'; want the prompt's tokens from `reset`, int32 [n]"),
    ("close", "raise OSError('gone')", "env.py:{line}: OSError: gone, for prompt 'p'"),
]


@pytest.mark.parametrize(("verb", "body", "message"), STEPS, ids=[f"{verb}: {body}" for verb, body, _ in STEPS])
def test_a_mistake_in_an_environment_is_told_with_key_line_and_prompt(tmp_path, capfd, verb, body, message):
    lines = ENV.splitlines()
    line = next(i for i, text in enumerate(lines) if f"def {verb}(" in text) + 1
    lines[line] = f"        {body}"
    with pytest.raises(RunError) as e:
        graded(own(tmp_path, env="\n".join(lines) + "\n"), tmp_path)
    said = str(e.value)
    assert said.startswith(f"env.name = '{tmp_path}/env.py:ENV': ")
    assert message.format(line=line + 1) in said
    assert "\n" not in said
    assert capfd.readouterr().err.count("Traceback") == ("{line}" in message)
