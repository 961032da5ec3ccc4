"""Whatever a policy writes: no reward raises, none is right by it, and files that show it can be written and read."""

import asyncio
import dataclasses
import json
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron import tasks
from stare_megatron.compare.samples import read_samples
from stare_megatron.config import RewardConfig
from stare_megatron.data.tokenizer import decoder
from stare_megatron.metrics.eval_records import response_row
from stare_megatron.metrics.sample_records import write_sample_records
from stare_megatron.metrics.samples import FOLDER, pick, write_samples
from stare_megatron.rewards import make_reward, math_worker
from stare_megatron.rewards.math_text import ascii_of, normal
from stare_megatron.rewards.stated import stated_choice, statement
from stare_megatron.tasks import reasoning
from stare_megatron.types import Call, Group, Prompt, Score, Turn
from tests import byte_tokenizer
from tests.properties import bounded
from tests.unit.rewards.test_rewards import Text, trajectory, written

TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=40)
PIECES = [
    *(
        "\\boxed{",
        "{",
        "}",
        "$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "\\frac",
        "\\sqrt",
        "^",
        "_",
        "(",
        ")",
        "[",
        "]",
        "|",
        ",",
        "/",
        "!",
    ),
    *(
        "<answer>",
        "</answer>",
        "The answer is ",
        "answer: ",
        "####",
        "**",
        "\\text{",
        "0.",
        "\\overline{3}",
        "\\%",
        "\\$",
        " or ",
    ),
    *(
        "1e400",
        "9**9**9**9",
        "9" * 5000,
        " " * 500,
        "nan",
        "inf",
        "½",
        "√",
        "²",
        "\u0305",
        "\ud83d",
        "(A)",
        "A",
        "km/h",
        "12:30",
        "\n",
    ),
    *("x", "=", "<", "\\infty", "\\pi", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "i", "e", "17", "-", "+"),
]
WRITTEN = st.lists(st.sampled_from(PIECES) | TEXT, max_size=12).map("".join)
REFERENCES = [
    "123456789",
    "B",
    "x^2+7",
    "(1234,77)",
    "[0,7]",
    "\\text{Yes, of course}",
    "\\sqrt{77}",
    "77\\%",
    "\\$7777",
    "2516_8",
]


@pytest.fixture(autouse=True, scope="module")
def long_numbers():
    """As in the worker's process."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(limit)


@bounded(400)
@given(WRITTEN)
def test_any_text_has_one_spelling(text):
    for found in (text, statement(text)):
        if found is not None:
            assert normal(ascii_of(found)) is not None
    stated_choice(text)
    assert ascii_of(ascii_of(text)) == ascii_of(text)


@bounded(50)
@given(WRITTEN.map(lambda text: text[:300]), st.sampled_from(REFERENCES))
def test_math_grades_any_text(text, reference):
    for response in (text, rf"so \boxed{{{text}}}", f"The answer is ${text}$."):
        said = math_worker.answer({"answer": reference, "response": response})
        assert said["graded"]
        assert not said["correct"] or reference == "B"
        json.dumps(said)


TASKS = [(name, tasks.get(name).prompts("train", 1, 0)[0]) for name in sorted(tasks.TASKS)]


@bounded(200)
@given(WRITTEN)
def test_the_other_rewards_grade_any_text(text):
    for name, p in [*TASKS, ("exact", dataclasses.replace(TASKS[0][1], answer="123456789"))]:
        prompt = Prompt(p.id, "s", p.text, (1,), p.answer)
        assert not asyncio.run(make_reward(RewardConfig(name=name))(prompt, written("1"), Text(text))).correct


GYM = [
    reasoning.prompts(d, {}, 1, 0, seed=2)[0].answer
    for d in ("chain_sum", "puzzle24", "prime_factorization", "countdown")
]


@bounded(80)
@given(WRITTEN.map(lambda text: text[:3000]), st.sampled_from(GYM))
def test_reasoning_gym_grades_any_text(text, answer):
    assert not reasoning.verify(answer, text).correct


@bounded(60)
@given(TEXT, TEXT, TEXT)
def test_samples_of_any_text_are_written_and_read(tmp_path_factory, code, note, answer):
    tokenizer = byte_tokenizer.make()
    played = dataclasses.replace(trajectory(), turns=(Turn((Call(code[:9], code, "ok", 0.1),), False),))
    group = Group(Prompt("p", "s", "q", (1,), answer), (played,), (Score(0.0, False, note),))
    folder, decode = tmp_path_factory.mktemp("run"), decoder(tokenizer)
    picked = pick({0: group}, [(0, 0)])
    write_samples(folder / FOLDER, 1, picked, 1, 1, decode)
    write_sample_records(folder / FOLDER, 1, picked, {}, decode)
    (step,) = read_samples(folder, 1)
    assert step.samples[0].note == note.encode("utf-8", "replace").decode()
    json.dumps(response_row(group, "greedy", 1, decode))


PATTERNS = [
    "\\boxed{",
    "{",
    "7",
    "7,",
    "1e",
    " ",
    "\\",
    "$",
    "-",
    ".",
    ",",
    "[",
    "(",
    "a/",
    "'",
    "√",
    "½",
    "\u0305",
    "７",
    "7 + 7 = 14 ",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["exact", *sorted(tasks.TASKS)])
def test_degenerate_responses_are_graded_in_linear_time(name, pattern):
    p = dict(TASKS).get(name, dataclasses.replace(TASKS[0][1], answer="123456789"))
    prompt, reward = Prompt(p.id, "s", p.text, (1,), p.answer), make_reward(RewardConfig(name=name))

    def seconds(size):
        response = Text(pattern * (size // len(pattern)))
        began = time.process_time()
        assert not asyncio.run(reward(prompt, written("1"), response)).correct
        return time.process_time() - began

    assert seconds(200_000) < 8 * max(seconds(50_000), 0.02)
