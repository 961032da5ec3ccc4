import functools
import json
import time

import pytest

from stare_megatron.errors import UserError
from stare_megatron.tasks import reasoning

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_prompts_are_few_shot_and_repeat():
    made = reasoning.prompts("chain_sum", SMALL, 20, 3, seed=1)
    assert reasoning.prompts("chain_sum", SMALL, 20, 3, seed=1) == made
    assert reasoning.prompts("chain_sum", SMALL, 20, 3, seed=2) != made
    for prompt in made:
        *shots, last = prompt.text.split("\n")
        assert len(shots) == 3
        assert last.endswith("Answer:")
        for shot in shots:
            question, _, answer = shot.partition(" Answer: ")
            assert eval(question.partition("problem: ")[2].removesuffix(" =")) == int(answer)


def test_questions_of_another_file_are_left_out():
    held_out = {q for p in reasoning.prompts("chain_sum", SMALL, 10, 3, seed=2) for q in reasoning.questions(p.text)}
    assert len(held_out) > 30
    made = reasoning.prompts("chain_sum", SMALL, 20, 3, seed=1, without=held_out)
    assert len(made) == 20
    assert not held_out & {q for p in made for q in reasoning.questions(p.text)}
    assert any(held_out & reasoning.questions(p.text) for p in reasoning.prompts("chain_sum", SMALL, 20, 3, seed=1))
    everything = {
        q for p in reasoning.prompts("chain_sum", SMALL, 2000, 0, seed=3) for q in reasoning.questions(p.text)
    }
    with pytest.raises(UserError, match="of 2000 questions are none of those left out"):
        reasoning.prompts("chain_sum", SMALL, 2000, 0, seed=4, without=everything)


def test_the_scorer_decides():
    prompt = reasoning.prompts("chain_sum", SMALL, 1, 0, seed=1)[0]
    right = json.loads(prompt.answer)["entry"]["answer"]
    assert reasoning.verify(prompt.answer, f" {right}\nQuestion: more").correct
    wrong = reasoning.verify(prompt.answer, f" {int(right) + 1}")
    assert (wrong.reward, wrong.correct) == (0.0, False)
    assert right in wrong.note
    assert not reasoning.verify(prompt.answer, "").correct


@pytest.mark.parametrize(
    ("dataset", "settings", "said"), [("no_such_set", {}, "no_such_set"), ("chain_sum", {"min_termz": 2}, "min_termz")]
)
def test_mistakes_are_the_users(dataset, settings, said):
    with pytest.raises(UserError, match=said):
        reasoning.prompts(dataset, settings, 1, 0, seed=0)


@functools.cache
def entries(dataset, count=4):
    gym = reasoning._gym()
    made = gym.create_dataset(dataset, seed=5, size=count)
    return [json.dumps({"dataset": dataset, "entry": made[i]}, default=str) for i in range(count)]


# What a policy writes that knows nothing. The data sets that take seconds a score are left out below.
NOTHING = [
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "nanj",
    "nan+nanj",
    "None",
    "null",
    "[]",
    "{}",
    "()",
    '""',
    "?",
    "*",
    "N/A",
    "-",
]
SLOW = {
    "composite",
    "knight_swap",
    "intermediate_integration",
    "futoshiki",
    "rubiks_cube",
    "zebra_puzzles",
    "rush_hour",
}


@pytest.mark.parametrize("dataset", sorted(set(reasoning.datasets()) - SLOW))
def test_nothing_is_never_right(dataset):
    for answer in entries(dataset, 2):
        for said in NOTHING:
            score = reasoning.verify(answer, said)
            assert not score.correct, (dataset, said)
            assert score.note


@pytest.mark.parametrize(
    ("dataset", "spoil"),
    [
        ("game_of_life_halting", lambda a: {"True": "False", "False": "True"}[a]),
        ("game_of_life_halting", lambda a: f"{a} or {a}"),
        ("complex_arithmetic", lambda a: a.replace(".", "1.")),
        ("coin_flip", lambda a: a[:1] + "." if len(a) > 1 else "0.5"),
        ("gsm_symbolic", lambda a: f"-{a}"),
        ("gsm_symbolic", lambda a: f"{a} or 999"),
        ("fraction_simplification", lambda a: f"{a} or 999"),
        ("fraction_simplification", lambda a: f"{a} {a}"),
        ("chain_sum", lambda a: f"{a} or {int(a) + 1}"),
    ],
)
def test_upstreams_generous_scorers_are_not_asked(dataset, spoil):
    for answer in entries(dataset):
        right = json.loads(answer)["entry"]["answer"]
        assert reasoning.verify(answer, right).correct
        assert not reasoning.verify(answer, spoil(right)).correct


@pytest.mark.parametrize(
    ("dataset", "answer", "said", "right"),
    [
        ("gsm_symbolic", "1754", "$1,754", True),
        ("gsm_symbolic", "1754", "1 754", False),
        ("gsm_symbolic", "1754", "17,54", False),
        ("gsm_symbolic", "1754", "1,7,5,4", False),
        ("gsm_symbolic", "1754", "17 54.", False),
        ("gsm_symbolic", "1754", "1_754", False),
        ("gsm_symbolic", "-4", "- 4.", True),
        ("complex_arithmetic", "-5.0 + 20.0i", "-5+20i", True),
        ("complex_arithmetic", "-5.0 + 20.0i", "- 5 + 20 i", True),
        ("complex_arithmetic", "-5.0 + 20.0i", "-5 + 2 0i", False),
        ("complex_arithmetic", "-5.0 + 20.0i", "1.7e308+1.7e308i", False),  # its magnitude is no float
        ("fraction_simplification", "$\\frac{3}{4}$", "3/4", True),
        ("fraction_simplification", "$\\frac{3}{4}$", "$ \\dfrac{ 3 }{ 4 } $", True),
        ("fraction_simplification", "3/4", "3 4", False),
        ("fraction_simplification", "3/4", "{3}{4}", False),
        ("fraction_simplification", "3/4", "3/4" + " " * 300 + "5", False),
        ("fraction_simplification", "3/4", "03/4", False),
    ],
)
def test_own_scorers_read_one_number_or_none(dataset, answer, said, right):
    reference = json.dumps({"dataset": dataset, "entry": {"answer": answer}})
    assert reasoning.verify(reference, said).correct is right


def test_powers_in_a_sum_are_no_tower():
    for answer in entries("polynomial_multiplication", 20):
        right = json.loads(answer)["entry"]["answer"]
        assert reasoning.verify(answer, right.replace(" ", "")).correct, right
    for tower in ("9**9**9", "9^(9-1)^9", "9 ** -(9) ** 9", "9**(9**9)", "9**(99999)"):
        assert "not evaluated" in reasoning.verify(entries("puzzle24", 1)[0], tower).note
    began = time.process_time()
    reasoning.verify(entries("puzzle24", 1)[0], "9^" + " " * 1900 + "x")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "dataset", ["prime_factorization", "boxnet", "game_of_life", "coin_flip", "puzzle24", "countdown"]
)
@pytest.mark.parametrize(
    "said",
    ["I think 2", "[1, 2, 3]", "[null]", "{}", "1e400", "9**9**9**9", "(" * 5000, "9" * 10_000, "\ud800", "__name__"],
)
def test_no_answer_is_an_error(dataset, said):
    for answer in entries(dataset, 2):
        assert not reasoning.verify(answer, said).correct


@pytest.mark.parametrize(
    "answer", ["", "17", "[]", "{}", '{"dataset": "chain_sum"}', '{"dataset": "no", "entry": {"answer": "1"}}']
)
def test_an_answer_of_another_kind_is_refused(answer):
    with pytest.raises(ValueError, match=r"make_reasoning_prompts"):
        reasoning.read(answer)
