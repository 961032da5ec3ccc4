"""Large mixes of problems as published, with rows that have no answer to check. Rows here are made up."""

from __future__ import annotations

import json

import pytest

from stare_megatron.__main__ import main
from stare_megatron.data.prepare import extract
from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.data.prepare.types import Problem

NUMINA = {
    "problem": "2+3?",
    "solution": "It is 5.",
    "answer": "5",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
    "source": "olympiads",
    "synthetic": False,
}
# Data set, a row in a published form of it, the problem, the answers.
MORE = [
    (
        "orz",
        {"0": {"from": "human", "value": "2+3?"}, "1": {"from": "assistant", "ground_truth": {"value": "5"}}},
        "2+3?",
        ("5",),
    ),
    (
        "big-math",
        {"problem": "2+3?", "answer": "5", "source": "cn_k12", "domain": ["Arithmetic"], "llama8b_solve_rate": 0.9},
        "2+3?",
        ("5",),
    ),
    ("numina-math-1.5", NUMINA, "2+3?", ("5",)),
    ("numina-math-cot", {"source": "aops", "problem": "2+3?", "solution": r"It is $\boxed{5}$."}, "2+3?", ("5",)),
    ("openr1-math", NUMINA | {"uuid": "u-1", "generations": ["It is 5."]}, "2+3?", ("5",)),
]


@pytest.fixture
def tool(tmp_path, capsys):
    """Runs the tool on rows, JSON or lines; returns its exit code, what it wrote, and the output's path."""

    def run(dataset, rows, *options):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / "out.jsonl"
        code = main(["prepare-data", dataset, "--file", str(tmp_path / "in.jsonl"), "--out", str(out), *options])
        said = capsys.readouterr()
        return code, said.out + said.err, out

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("dataset", "row", "text", "answers"), MORE)
def test_problems_and_answers_are_found(tmp_path, dataset, row, text, answers):
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = extract.problems(RECIPES[dataset], tmp_path / "in.jsonl")
    assert isinstance(found, Problem)
    assert (found.text, found.answers) == (text, answers)


def test_rows_without_an_answer_to_check_are_left_out_and_listed(tool):
    rows = [
        NUMINA,
        NUMINA | {"problem": "Show it.", "question_type": "proof", "answer": "proof"},
        NUMINA | {"problem": "How many?", "answer": "notfound"},
        NUMINA | {"problem": "And then?", "answer": None},
        NUMINA | {"problem": "Half of", "problem_is_valid": "Incomplete"},
        NUMINA | {"problem": "3+3?", "answer": "6", "problem_is_valid": None, "question_type": "MCQ"},
    ]
    code, said, out = tool("numina-math-1.5", rows)
    assert code == 0
    assert "2 of 6 rows; left out: 4 without an answer to check" in said
    listed = lines(out.with_name("out.jsonl.removed.jsonl"))
    reasons = ["a proof", "no answer: 'notfound'", "no answer: None", "problem_is_valid: 'Incomplete'"]
    assert [r["reason"] for r in listed] == reasons
    assert [r["problem"] for r in listed] == ["Show it.", "How many?", "And then?", "Half of"]
    _, said, out = tool(
        "numina-math-cot", [{"problem": "2+3?", "solution": r"\\boxed{5}"}, {"problem": "Show", "solution": "qed"}]
    )
    assert "1 of 2 rows; left out: 1 without an answer to check" in said


def test_rows_that_are_lists_of_messages(tool):
    row = [{"from": "human", "value": "2+3?"}, {"from": "assistant", "ground_truth": {"value": "5"}}]
    code, said, out = tool("orz", [[row, [], ["x"]]], "--skip-malformed")  # one array, as published
    assert code == 0, said
    assert [(r["problem"], r["answer"]) for r in lines(out)] == [("2+3?", "5")]
    assert "left out: 2 malformed" in said
