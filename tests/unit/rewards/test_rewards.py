import asyncio
import dataclasses

import numpy as np
import pytest

from stare_megatron import tasks
from stare_megatron.config import RewardConfig
from stare_megatron.errors import UserError
from stare_megatron.rewards import make_reward
from stare_megatron.rewards.base import response_text
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
    return Trajectory("p", 0, tuple(made), status, weight_versions=(0, 0), seed=0)


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
    with pytest.raises(UserError, match=r"reward.name = 'maths' is not registered \(did you mean 'math'\?\)"):
        make_reward(RewardConfig(name="maths"))


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
    score = asyncio.run(make_reward(RewardConfig(name="order_free_sum"))(PROMPT, t, TOKENIZER))
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
    assert asyncio.run(make_reward(RewardConfig(name="exact"))(prompt, written("1"), Text(text))).correct is right
