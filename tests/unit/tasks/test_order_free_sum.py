import random

import pytest

from stare_megatron import tasks
from stare_megatron.errors import UserError
from stare_megatron.tasks.base import SPECIAL_WORDS, TaskPrompt
from stare_megatron.tasks.order_free_sum import TASK

PROMPT = "7 8 3 12 :"
RIGHT = "7 + 8 = 15 15 + 3 = 18 18 + 12 = 30"


def verify(response: str, prompt: str = PROMPT, answer: str = "30") -> bool:
    return TASK.verify(prompt, answer, response).correct


def test_right_responses_are_right():
    assert verify(RIGHT)
    assert verify("8 + 12 = 20 3 + 20 = 23 23 + 7 = 30")
    assert verify("7 + 8 = 15 3 + 12 = 15 15 + 15 = 30")


@pytest.mark.parametrize(
    ("response", "note"),
    [
        ("", "words"),
        ("7 + 8 = 15 15 + 3 = 18", "words"),
        (RIGHT + " 30", "words"),
        (RIGHT + " 30 + 0 = 30", "words"),
        ("7 + 8 = 16 16 + 3 = 19 19 + 12 = 31", "step 1: 7 + 8 = 16 is wrong"),
        ("7 + 7 = 14 14 + 3 = 17 17 + 12 = 29", "step 1: 7 is not there"),
        ("7 + 8 = 15 7 + 3 = 10 10 + 12 = 22", "step 2: 7 is not there"),
        ("7 + 8 = 15 15 + 3 = 18 18 + 11 = 29", "step 3: 11 is not there"),
        ("7 8 + = 15 15 + 3 = 18 18 + 12 = 30", "step 1"),
        ("07 + 8 = 15 15 + 3 = 18 18 + 12 = 30", "step 1"),
        ("7 + 8 = 15 15 + 3 = 18 18 + 12 = <pad>", "step 3"),
        ("7  + 8 = 15 15 + 3 = 18 18 + 12 = 30", "words"),
        ("٧ + 8 = 15 15 + 3 = 18 18 + 12 = 30", "step 1"),
    ],
)
def test_wrong_responses_are_wrong(response, note):
    score = TASK.verify(PROMPT, "30", response)
    assert not score.correct
    assert score.reward == 0.0
    assert note in score.note


def test_wrong_answer_column_is_noticed():
    assert not verify(RIGHT, answer="31")


def test_traces_are_right_and_cover_every_order():
    prompt = TaskPrompt("x", "1 2 5 11 :", "19")  # no two orders read the same
    rng = random.Random(1)
    traces = [TASK.trace(prompt, rng) for _ in range(3000)]
    assert all(TASK.verify(prompt.text, prompt.answer, t).correct for t in traces)
    assert len(set(traces)) == 144
    words = set(SPECIAL_WORDS) | set(TASK.words)
    assert {w for t in traces for w in t.split()} <= words


def test_splits_are_disjoint_as_sets_of_numbers_and_repeatable():
    train, held_out, test = (TASK.prompts(s, n, 0) for s, n in (("train", 4000), ("eval", 1000), ("test", 1000)))
    keys = [{tuple(sorted(p.text.split())) for p in prompts} for prompts in (train, held_out, test)]
    assert sum(map(len, keys)) == len(set().union(*keys))
    assert len({p.text for p in train}) == len(train)
    assert TASK.prompts("train", 4000, 0) == train
    assert TASK.prompts("train", 4000, 1) != train
    with pytest.raises(UserError, match="eval"):
        TASK.prompts("eval", 20736, 0)


def test_a_trace_fits_the_response_budget():
    prompt = TASK.prompts("train", 1, 0)[0]
    assert len(TASK.trace(prompt, random.Random(0)).split()) + 1 == TASK.max_response_tokens
    assert len(prompt.text.split()) + 1 == TASK.max_prompt_tokens


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="order_free_sum"):
        tasks.get("order_free_sums")
