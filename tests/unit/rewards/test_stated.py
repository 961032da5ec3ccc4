"""Which part of a response is read as its answer."""

import time

import pytest

from stare_megatron.rewards.math_worker import answer
from stare_megatron.rewards.stated import stated_choice, statement


@pytest.mark.parametrize("lead", ["Therefore, ", "Thus ", "hence: ", "So, ", "∴ ", "Finally, "])
@pytest.mark.parametrize("said", ["5", "x = 5", r"$\frac{1}{2}$", "12 apples"])
def test_a_word_that_draws_the_conclusion_is_no_part_of_it(lead, said):
    assert statement(f"We add them.\n{lead}{said}") == said


@pytest.mark.parametrize("said", ["Then", "So", "Thus"])
def test_such_a_word_alone_is_all_there_is(said):
    assert statement(said) == said


@pytest.mark.parametrize("words", ["It certainly isn't", "We have seen that it can't be more here, and isn't", "not"])
def test_a_number_that_is_denied_is_no_answer(words):
    assert statement(f"Of all the numbers that we tried here, {words} 5") is None
    assert statement("Of all the numbers that we tried here, it comes to 5") == "5"


@pytest.mark.parametrize(
    ("tag", "letter"),
    [
        ("The answer is B", "B"),
        ("I choose (C) because it is right", "C"),
        ("B", "B"),
        ("A or B", ""),
        ("The answer is A or B", ""),
        ("no idea", None),
    ],
)
def test_a_choice_in_tags_may_be_stated_in_a_sentence(tag, letter):
    assert stated_choice(f"Option D looks right. The answer is D. <answer>{tag}</answer>") == letter


@pytest.mark.parametrize("response", ["The answer is " + "the " * 24 + "x", r"\boxed{7 " + "a" * 28 + "_1}"])
def test_repetition_takes_no_time(response):
    began = time.process_time()
    assert not answer({"answer": "17", "response": response})["correct"]
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("reference", "content", "right"),
    [
        ("(0.000000001)", r"0.00001\%", False),
        ("10^{-9.0}", r"0.00001\%", False),
        ("(0.0000001)", r"0.00001\%", True),
        (r"\frac{1}{2}", r"50\%", True),
        ("50", r"50\%", True),
        (r"25\pi\%", r"25\pi", True),
        (r"\frac{1}{2}", r"5000\%", False),
    ],
)
def test_a_hundred_times_an_answer_is_another(reference, content, right):
    assert answer({"answer": reference, "response": rf"\boxed{{{content}}}"})["correct"] is right
