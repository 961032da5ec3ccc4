import asyncio
import dataclasses
import os
import time

import numpy as np
import pytest

from stare_megatron import tasks
from stare_megatron.errors import UserError
from stare_megatron.rewards import make_reward
from stare_megatron.rewards.base import RewardError, response_text
from stare_megatron.rewards.math_answer import MathReward, last_boxed
from stare_megatron.rewards.workers import WorkerError, WorkerPool
from stare_megatron.tasks.tiny_model import make_tokenizer
from stare_megatron.types import Prompt, Span, SpanKind, Status, Trajectory

TOKENIZER = make_tokenizer(tasks.get("order_free_sum"))
PROMPT = Prompt("p", "s", "7 8 3 12 :", (1, 19, 20, 15, 24, 5), "30")
RIGHT = "7 + 8 = 15 15 + 3 = 18 18 + 12 = 30"


def trajectory(*spans: tuple[SpanKind, list[int]], status: Status = Status.COMPLETED) -> Trajectory:
    made = [Span(SpanKind.PROMPT, np.array(PROMPT.token_ids, np.int32), np.zeros(0, np.float32))]
    for kind, ids in spans:
        count = len(ids) if kind is SpanKind.ACTION else 0
        made.append(Span(kind, np.array(ids, np.int32), np.zeros(count, np.float32)))
    return Trajectory("p", 0, tuple(made), status, weight_version=0, seed=0)


def written(text: str, tail: tuple[int, ...] = (2,), status: Status = Status.COMPLETED) -> Trajectory:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return trajectory((SpanKind.ACTION, [*ids, *tail]), status=status)


class Text:
    """A tokenizer for rewards of free text: decodes every trajectory to one string."""

    eos_token_id = 2

    def __init__(self, text: str) -> None:
        self._text = text

    def decode(self, ids, skip_special_tokens):
        return self._text


def test_unknown_reward_names_the_nearest():
    with pytest.raises(UserError, match=r"reward.name = 'maths': unknown reward; did you mean 'math'\?"):
        make_reward("maths")


def test_response_text_is_what_the_policy_wrote():
    t = trajectory((SpanKind.ACTION, [15, 4]), (SpanKind.OBSERVATION, [99]), (SpanKind.ACTION, [16, 2]))
    assert response_text(t, TOKENIZER, skip_special_tokens=False) == "3 + 4"


@pytest.mark.parametrize(
    ("t", "right"),
    [
        (written(RIGHT), True),
        (written(RIGHT, tail=()), True),  # ended by itself: a stop string may have ended it
        (written(RIGHT, tail=(), status=Status.TRUNCATED), False),
        (written(RIGHT, tail=(2, 2)), False),
        (written(RIGHT, tail=(0, 2)), False),
        (written("8 + 7 = 16 16 + 3 = 19 19 + 12 = 31"), False),
        (trajectory((SpanKind.ACTION, [2])), False),
    ],
)
def test_order_free_sum(t, right):
    score = asyncio.run(make_reward("order_free_sum")(PROMPT, t, TOKENIZER))
    assert (score.correct, score.reward) == (right, float(right))
    assert bool(score.note) is not right


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("12", " 12\n", True),
        ("12", "3 + 9 = 12", True),
        ("12", "12 then 13", False),
        ("12", "112", False),
        ("12", "", False),
        ("1200", "it is 1,200.", True),
        ("-4", "so -4", True),
        ("4", "7-4", True),
        ("0.5", ".5 or 0.50", True),
        ("yes", " yes ", True),
        ("yes", "yes 1", False),
    ],
)
def test_exact(answer, text, right):
    prompt = dataclasses.replace(PROMPT, answer=answer)
    assert asyncio.run(make_reward("exact")(prompt, written("1"), Text(text))).correct is right


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} or \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{}", ""),
        ("none", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_math():
    cases = [
        (r"\frac{1}{2}", r"so \boxed{0.5}", True),
        ("17", "The answer is 17.", True),
        ("17", r"\boxed{17} no, \boxed{18}", False),
        ("x^2+1", r"\boxed{1+x^2}", True),
        ("(1,2)", r"\boxed{(1, 2)}", True),
        ("17", r"\boxed{}", False),
        ("17", "no idea", False),
    ]

    async def grade() -> list[bool]:
        reward = MathReward()
        try:
            scores = await asyncio.gather(
                *(reward(dataclasses.replace(PROMPT, answer=a), written("1"), Text(t)) for a, t, _ in cases)
            )
        finally:
            await reward.close()
        return [s.correct for s in scores]

    assert asyncio.run(grade()) == [right for _, _, right in cases]


WORKER = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        os._exit(3)
    time.sleep(request["do"] == "hang" and 3600)
    print(json.dumps({"pid": os.getpid()}), flush=True)
"""


@pytest.fixture
def worker_module(tmp_path, monkeypatch):
    (tmp_path / "stare_test_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stare_test_worker"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_hanging_worker_is_killed_and_the_loop_goes_on(worker_module):
    async def run() -> tuple[int, int, int]:
        pool = WorkerPool(worker_module, size=1, timeout=1.0)
        first = (await pool.call({"do": "work"}))["pid"]
        again = (await pool.call({"do": "work"}))["pid"]
        hanging = asyncio.create_task(pool.call({"do": "hang"}))
        ticks = 0
        while not hanging.done():  # the loop is not blocked meanwhile
            await asyncio.sleep(0.05)
            ticks += 1
        with pytest.raises(WorkerError, match="no answer within 1 s"):
            await hanging
        assert first == again
        assert not alive(first)
        other = (await pool.call({"do": "work"}))["pid"]
        await pool.close()
        return first, other, ticks

    began = time.monotonic()
    first, other, ticks = asyncio.run(run())
    assert first != other
    assert ticks > 5
    assert not alive(other)
    assert time.monotonic() - began < 60


def test_a_dead_worker_is_an_error_of_its_call_only(worker_module):
    async def run() -> None:
        pool = WorkerPool(worker_module, size=1, timeout=10.0)
        with pytest.raises(WorkerError, match="died"):
            await pool.call({"do": "die"})
        assert "pid" in await pool.call({"do": "work"})
        await pool.close()

    asyncio.run(run())


def test_math_turns_a_worker_error_into_a_reward_error(tmp_path, monkeypatch):
    (tmp_path / "stare_test_worker.py").write_text("import sys\nprint('ready', flush=True)\nsys.stdin.readline()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def run() -> None:
        reward = MathReward()
        reward._pool = WorkerPool("stare_test_worker", size=1, timeout=10.0)
        await reward(PROMPT, written("1"), Text("1"))

    with pytest.raises(RewardError, match="died"):
        asyncio.run(run())
