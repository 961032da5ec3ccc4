import random

import pytest

from stare_megatron.errors import UserError
from stare_megatron.tasks.number_walk import TASK


def test_every_trace_is_right_and_fits():
    rng = random.Random(0)
    for prompt in TASK.prompts("train", 400, 0):
        trace = TASK.trace(prompt, rng)
        assert TASK.verify(prompt.text, prompt.answer, trace).correct, (prompt.text, trace)
        assert len(trace.split()) + 1 <= TASK.max_response_tokens
        assert len(prompt.text.split()) + 1 == TASK.max_prompt_tokens


def test_traces_are_all_routes_evenly():
    prompt = next(p for p in TASK.prompts("train", 3000, 0) if 4 <= _count(p.text) <= 6)
    rng = random.Random(0)
    seen = [TASK.trace(prompt, rng) for _ in range(2000)]
    counts = sorted(seen.count(t) for t in set(seen))
    assert len(counts) == _count(prompt.text)
    assert counts[0] > 0.75 * 2000 / len(counts)


def _count(text: str) -> int:
    start, goal = map(int, text.removesuffix(" :").split(" , "))
    frontier, found = [start], 0
    for _ in range(TASK.moves):
        frontier = [n for m in frontier for n in (m + 7, m - 4, m * 2) if 0 <= n <= TASK.largest]
        found += frontier.count(goal)
    return found


@pytest.mark.parametrize(
    ("response", "note"),
    [
        ("+ 7 = 10 * 2 = 20 + 7 = 27", ""),
        ("+ 7 = 10 * 2 = 20", "ends at 20"),
        ("+ 7 = 11 * 2 = 22 + 7 = 29", "move 1"),
        ("+ 3 = 6 + 7 = 13 * 2 = 26", "move 1"),
        ("- 4 = -1 + 7 = 6", "move 1"),
        ("+ 7 = 10 * 2 = 20 + 7 = 027", "move 3"),
        ("+ 7 = 10 * 2", "words"),
        ("", "words"),
        ("+ 7 = 10 " * 7 + "+ 7 = 17", "words"),
    ],
)
def test_only_moves_to_the_goal_are_right(response, note):
    score = TASK.verify("3 , 27 :", "27", response)
    assert (score.reward, score.correct) == (float(not note), not note)
    assert note in score.note


def test_splits_are_disjoint_and_bounded():
    texts = [
        {p.text for p in TASK.prompts(split, n, 0)} for split, n in (("train", 3000), ("eval", 400), ("test", 400))
    ]
    assert sum(map(len, texts)) == len(set().union(*texts))
    with pytest.raises(UserError, match="number_walk"):
        TASK.prompts("test", 1000, 0)
