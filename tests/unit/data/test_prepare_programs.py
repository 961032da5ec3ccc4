"""Published programming problems to prompt files with tests that the reward `code` reads. Rows here are made up."""

from __future__ import annotations

import json

import pytest

from stare_megatron.__main__ import main
from stare_megatron.data.prepare.programs import INSTRUCTION
from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.rewards.code_tests import AssertTest, CallTest, StdinTest, read_tests

IO = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
CALL = json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]})
CASES = json.dumps([{"type": "function_call", "fn_name": "add", "input": [1, 2], "output": [3]}])
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n"
MBPP = {"task_id": 7, "text": "Double it.", "test_list": ["assert double(1) == 2"], "test_setup_code": ""}
PUBLISHED = [
    (
        "apps",
        {"problem_id": 3, "question": "Add.", "input_output": IO, "starter_code": ""},
        "Add.",
        StdinTest("1 2\n", "3\n"),
    ),
    (
        "taco",
        {"question": "Add.", "input_output": CALL, "starter_code": "def add(a, b):\n"},
        "Add.\n\nBegin with:\n```python\ndef add(a, b):\n```",
        CallTest("add", "[1, 2]", [3]),
    ),
    ("deepcoder", {"problem": "Add.", "tests": CASES}, "Add.", CallTest("add", "[1, 2]", [3])),
    (
        "mbpp",
        MBPP,
        "Double it.\n\nThe code must pass:\n```python\nassert double(1) == 2\n```",
        AssertTest("assert double(1) == 2"),
    ),
    (
        "mbpp",
        {"prompt": "Double it.", "test_list": ["assert double(1) == 2"], "test_imports": ["import math"]},
        "Double it.\n\nThe code must pass:\n```python\nassert double(1) == 2\n```",
        AssertTest("import math\nassert double(1) == 2"),
    ),
    (
        "humaneval",
        {"task_id": "H/0", "prompt": "def inc(x):\n    ...", "test": CHECK, "entry_point": "inc"},
        "def inc(x):\n    ...",
        AssertTest(f"{CHECK}\ncheck(inc)"),
    ),
]


def prepared(tmp_path, dataset, rows, *options):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    code = main(["prepare-data", dataset, "--file", str(tmp_path / "in.jsonl"), "--out", str(out), *options])
    return code, [json.loads(line) for line in out.read_text().splitlines()] if code == 0 else []


@pytest.mark.parametrize(("dataset", "row", "text", "test"), PUBLISHED)
def test_tests_come_with_the_problem(tmp_path, dataset, row, text, test):
    code, (made,) = prepared(tmp_path, dataset, [row, row])
    assert code == 0
    assert (made["prompt"], made["answer"]) == (f"{text}\n{INSTRUCTION}", "-")
    assert read_tests(made["tests"]) == (test,)


def test_every_data_set_with_tests_is_here():
    programs = {name for name, recipe in RECIPES.items() if any(layout.tests for layout in recipe.layouts)}
    assert {dataset for dataset, *_ in PUBLISHED} == programs


def test_an_instruction_of_ones_own_is_kept(tmp_path):
    _, (made,) = prepared(tmp_path, "apps", [PUBLISHED[0][1]], "--instruction", "Now!")
    assert made["prompt"] == "Add.\nNow!"


@pytest.mark.parametrize(
    ("dataset", "change", "words"),
    [
        ("apps", {"input_output": ""}, "field 'input_output': want JSON in a string"),
        ("apps", {"input_output": "{}"}, "want inputs and outputs, or a list of cases"),
        ("apps", {"input_output": '{"inputs": [], "outputs": []}'}, "no tests"),
        ("mbpp", {"test_list": []}, "field 'test_list': want a list of asserts"),
        ("humaneval", {"entry_point": "a b"}, "want a function `check` and an entry_point"),
    ],
)
def test_tests_that_cannot_be_read_are_named(tmp_path, capsys, dataset, change, words):
    row = next(row for name, row, *_ in PUBLISHED if name == dataset)
    code, _ = prepared(tmp_path, dataset, [row | change])
    assert code == 2
    assert words in "".join(capsys.readouterr())
