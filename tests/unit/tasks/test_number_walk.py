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


def _can_be_right(prompt, words):
    """By trying every end."""
    if TASK.verify(prompt.text, prompt.answer, " ".join(words)).correct:
        return True
    moves, within = divmod(len(words), 4)
    if within or moves >= TASK.moves:
        return False
    here = int(words[-1]) if words else int(prompt.text.split()[0])
    ends = ((s, str(a), "=", str(n)) for s, a, n in (("+", 7, here + 7), ("-", 4, here - 4), ("*", 2, here * 2)))
    return any(_can_be_right(prompt, [*words, *end]) for end in ends if 0 <= int(end[3]) <= TASK.largest)


def test_words_that_leave_the_goal_within_reach_are_those_of_some_right_response():
    rng = random.Random(1)
    for prompt in TASK.prompts("test", 12, 0):
        words = []
        while "" not in (right := TASK.right_next(prompt.text, words)) or rng.random() < 0.5:
            if not len(words) % 4:
                here = int(words[-1]) if words else int(prompt.text.split()[0])
                moves = {"+": ("7", here + 7), "-": ("4", here - 4), "*": ("2", here * 2)}
                for sign, (amount, number) in moves.items():
                    move = (sign, amount, "=", str(number))
                    assert (sign in right) == (0 <= number <= TASK.largest and _can_be_right(prompt, [*words, *move]))
            if not (on := sorted(right - {""})):
                break
            words.append(rng.choice(on))
        assert TASK.verify(prompt.text, prompt.answer, " ".join(words)).correct


def test_after_a_wrong_word_nothing_is_right():
    assert TASK.right_next("3 , 10 :", []) >= {"+"}
    assert TASK.right_next("3 , 10 :", ["+", "7", "=", "10"]) >= {""}
    assert TASK.right_next("3 , 10 :", ["+", "7", "="]) == {"10"}
    for words in (["+", "4"], ["+", "7", "=", "11"], ["*", "7", "=", "6", "+"], ["-", "4", "=", "-1"], ["7"]):
        assert TASK.right_next("3 , 10 :", words) == frozenset()
