"""Tests of problems in their published forms, and what counts as the same output."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from stare_megatron import config
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.errors import UserError
from stare_megatron.rewards import RewardError, check_prompts, make_reward
from stare_megatron.rewards.code_answer import chosen, last_block
from stare_megatron.rewards.code_tests import (
    AssertTest,
    CallTest,
    StdinTest,
    read_tests,
    same_output,
    same_value,
)
from stare_megatron.sandbox.result import Result, Status, lost
from tests.unit.rewards.test_rewards import PROMPT, Text, written

ADD = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}


@pytest.mark.parametrize(
    ("value", "tests"),
    [
        (ADD, (StdinTest("1 2\n", "3\n"), StdinTest("3 4\n", "7\n"))),
        (json.dumps(ADD), (StdinTest("1 2\n", "3\n"), StdinTest("3 4\n", "7\n"))),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, (StdinTest("1\n2", "3"),)),
        ({"fn_name": None, **ADD}, (StdinTest("1 2\n", "3\n"), StdinTest("3 4\n", "7\n"))),
        ({"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, (CallTest("add", "[1, 2]", [3]),)),
        ({"fn_name": "add", "inputs": ["1\n[2]"], "outputs": ["3"]}, (CallTest("add", "[1, [2]]", 3),)),
        ([{"input": "1 2", "output": "3", "testtype": "stdin"}], (StdinTest("1 2", "3"),)),
        (
            [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}],
            (CallTest("add", "[1, 2]", 3),),
        ),
        (
            [{"type": "function_call", "fn_name": "add", "input": [1, 2], "output": [3]}],
            (CallTest("add", "[1, 2]", [3]),),
        ),
        (["assert f(1) == 2", "assert f(2) == 3"], (AssertTest("assert f(1) == 2"), AssertTest("assert f(2) == 3"))),
        ({"asserts": ["check(f)"], "setup": "import math"}, (AssertTest("import math\ncheck(f)"),)),
    ],
)
def test_published_forms(value, tests):
    assert read_tests(value) == tests


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "tests that are no JSON"),
        ("[" * 100000, "tests that are no JSON"),
        (7, "tests of no known form: 7"),
        (None, "no known form"),
        ([], "no tests"),
        ({"inputs": [], "outputs": []}, "no tests"),
        ({"inputs": ["1"], "outputs": []}, "as many outputs as inputs"),
        ({"inputs": ["1"]}, "as many outputs as inputs"),
        ({"inputs": [1], "outputs": ["1"]}, "input 1: want a text, got 1"),
        ({"inputs": ["1"], "outputs": [None]}, "output 1: want a text, got None"),
        ({"fn_name": "a b", "inputs": [[1]], "outputs": [1]}, "fn_name = 'a b' is no name"),
        ({"fn_name": "f", "inputs": [1], "outputs": [1]}, "input 1: want the arguments as a list"),
        ({"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}, "test 1: an argument or result that is no JSON"),
        ([{"input": "1", "output": "1", "type": "function_call"}], "test 1: a call without the function's name"),
        ({"asserts": "assert 1"}, "asserts: want a list"),
        ({"asserts": [1]}, "assert 1: want a text"),
    ],
)
def test_what_is_no_test_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        read_tests(value)


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("3\n", "3", True),
        ("3  \n\n\n", "3\n", True),
        ("1  2\n3", "1 2\n3", True),
        ("1 2 3", "1 2\n3", False),
        ("\n3", "3", False),
        ("3", "4", False),
        ("", "3", False),
        ("", "\n", True),
        ("YES", "Yes", False),
        ("0.3333333", "0.33333333333", True),
        ("0.334", "0.333", False),
        ("1", "1.0", True),
        ("1000001", "1000000", False),
        ("1.0000001", "1", False),
        ("nan", "1.0", False),
        ("one", "1.0", False),
        ("9" * 60000, "9" * 60000 + ".0", False),
    ],
)
def test_same_output(printed, wanted, same):
    assert same_output(printed, wanted, 1e-6) is same


def test_same_value():
    assert same_value([1, {"a": [0.5000001]}], [1, {"a": [0.5]}], 1e-6)
    assert not same_value([1, 2], [1, 2, 3], 1e-6)
    assert not same_value({"a": 1}, {"b": 1}, 1e-6)
    assert not same_value("1", 1, 1e-6)
    assert not same_value(1.0000001, 1, 1e-6)


def test_a_result_alone_or_in_a_list():
    test = CallTest("f", "[]", [3])
    assert [test.fault(f"hello\n\x1e{told}", 0) for told in ("3", "[3]")] == ["", ""]
    assert test.fault("\x1e4", 0) == "returned 4, want [3]"
    assert CallTest("f", "[]", []).fault("\x1e[]", 0) == ""
    for told in ("", "3", "\x1e{", "\x1e" + "[" * 99999):
        assert test.fault(told, 0) == "the function's result cannot be read"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("so:\n```python\nprint(1)\n```\nthat is it", "print(1)\n"),
        ("```\na\n```\n```py\nb\n```\n```text\nc\n```", "b\n"),
        ("```python\na\n```\nno, better\n```python\nb", "a\n"),
        ("  ```Python\n  a\n  ```", "  a\n"),
        ("print(1)", None),
        ("```python\n\n```", None),
        ("", None),
        ("```" * 100000, None),
    ],
)
def test_the_last_block(text, code):
    assert last_block(text) == code


def test_the_longest_inputs_are_chosen():
    tests = tuple(StdinTest("x" * n, "") for n in (1, 5, 3, 5, 2))
    assert [t.size for t in chosen(tests, 3)] == [5, 3, 5]
    assert chosen(tests, 0) == chosen(tests, 9) == tests


class Box:
    """Answers each call with the next result."""

    def __init__(self, *results):
        self.results, self.asked = list(results), []

    async def run(self, code, stdin="", *, echo=False, seconds=0.0):
        self.asked.append((stdin, seconds))
        return self.results.pop(0)


def graded(box, tests=ADD, text="```python\nprint(1)\n```", **settings):
    tree = {"run": {"steps": 1}, "model": {"path": "m"}, "data": {"train": ["t"]}}
    made = config.parse(tree | {"reward": {"name": "code", **settings}}, "test")
    assert made.uses_sandbox
    assert made.data.extra_keys == [settings.get("tests_key", "tests")]
    prompt = dataclasses.replace(PROMPT, extra={made.data.extra_keys[0]: tests})
    return asyncio.run(make_reward(made.reward, box, made.sandbox)(prompt, written("1"), Text(text)))


def ran(status=Status.OK, out="", err="", code=0):
    return Result(status, out, err, "", code, 1.0, 1.0)


def test_all_or_a_fraction():
    box = Box(ran(out="4"), ran(out="7"))
    score = graded(box, test_seconds=2.5)
    assert (score.reward, score.correct, score.note) == (0.0, False, "test 1 of 2: printed '4', want '3'")
    assert box.asked == [("1 2\n", 2.5)]  # the first failure ends it
    score = graded(Box(ran(out="4"), ran(out="7")), tests_score="fraction")
    assert (score.reward, score.correct) == (0.5, False)
    assert graded(Box(ran(out="3"), ran(out="7"))).correct
    assert graded(Box(ran(out="3"), ran(out="7")), tests_score="fraction", tests_key="a.b").reward == 1.0
    assert graded(Box(ran(out="7")), max_tests=1, tests=ADD | {"inputs": ["1", "3 4"]}).correct
    near = {"inputs": ["1"], "outputs": ["3.0"]}
    assert not graded(Box(ran(out="3.1")), tests=near).correct
    assert graded(Box(ran(out="3.1")), tests=near, tolerance=0.1).correct
    assert graded(Box(), text="print(1)").note == "no complete block of Python code"


@pytest.mark.parametrize(
    ("result", "note"),
    [
        (ran(Status.ERROR, "3", "Traceback\nNameError: x\n", 1), "NameError: x"),
        (ran(Status.TIMEOUT, "3"), "took too long"),
        (ran(Status.OUTPUT, "3"), "printed too much"),
        (ran(Status.TAMPERED, "3"), "wrote where it must not"),
        (ran(Status.EXITED, "3", code=1), "left before its end"),
    ],
)
def test_how_a_test_fails(result, note):
    assert graded(Box(result)).note == f"test 1 of 2: {note}"


def test_an_exit_ends_a_program_well_and_an_assert_not():
    assert graded(Box(ran(Status.EXITED, "3"), ran(out="7"))).correct
    assert not graded(Box(ran(Status.EXITED)), tests=["assert f(1)"]).correct


def test_a_sandbox_that_fails_grades_nothing():
    with pytest.raises(RewardError, match="the sandbox failed: an actor died"):
        graded(Box(ran(out="3"), lost("an actor died")))
    with pytest.raises(RewardError, match="no tests"):
        graded(Box(), tests=[])
    with pytest.raises(ValueError, match="needs a sandbox"):
        graded(None)


def test_prompts_are_asked_for_their_tests():
    reward = config.RewardConfig(name="code")
    good = dataclasses.replace(PROMPT, extra={"tests": ADD})
    check_prompts(reward, [good], "t.jsonl")
    with pytest.raises(UserError, match=r"t.jsonl: prompt 'p': .* no tests"):
        check_prompts(reward, [dataclasses.replace(PROMPT, extra={"tests": []})], "t.jsonl")
    with pytest.raises(UserError, match=r"test 1 wants 2 bytes of output, sandbox.output_bytes is 1: raise it"):
        check_prompts(reward, [good], "t.jsonl", SandboxConfig(output_bytes=1))
