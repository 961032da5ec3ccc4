"""Published data sets to prompt files. Rows here are made up, in each data set's published form."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stare_megatron.__main__ import main
from stare_megatron.config import DataConfig
from stare_megatron.data.prepare import extract, overlap
from stare_megatron.data.prepare.overlap import Contamination, Reference
from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.data.prepare.types import Malformed, Problem
from stare_megatron.data.prompts import load_prompts
from stare_megatron.errors import UserError
from stare_megatron.tasks import get
from stare_megatron.tasks.tiny_model import make_tokenizer
from tests.unit.data.test_prepare_mixes import MORE
from tests.unit.data.test_prepare_programs import PUBLISHED as PROGRAMS

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def chat(text: str) -> list[dict]:
    return [{"content": text, "role": "user"}]


DAPO = {
    "data_source": "math_dapo",
    "prompt": chat(f"{BEFORE}What is 17 + 17?{AFTER}"),
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-0000"},
}
SKYWORK = {
    "data_source": "train-math-made_up",
    "prompt": chat("What is 2/3 of 9?"),
    "ability": "math",
    "reward_model": {"ground_truth": '["6"]', "style": "rule"},
    "extra_info": {"index": 5, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
}
# Data set, a row in a published form of it, the problem, the answers.
PUBLISHED = [
    ("dapo-math-17k", DAPO, "What is 17 + 17?", ("34",)),
    ("dapo-math-17k", {"prompt": "What is 17 + 17?", "solution": "34"}, "What is 17 + 17?", ("34",)),
    ("deepscaler", {"problem": "2+3?", "answer": "5", "solution": "it is 5"}, "2+3?", ("5",)),
    ("skywork-or1", SKYWORK, "What is 2/3 of 9?", ("6",)),
    (
        "skywork-or1",
        SKYWORK | {"reward_model": {"ground_truth": '["1/2", "0.5"]'}},
        "What is 2/3 of 9?",
        ("1/2", "0.5"),
    ),
    ("polaris", {"problem": "2+3?", "answer": "5", "difficulty": "3/8"}, "2+3?", ("5",)),
    ("gsm8k", {"question": "How many?", "answer": "3 * 411 = <<3*411=1233>>1233\n#### 1,233"}, "How many?", ("1233",)),
    ("math", {"problem": "2+3?", "answer": r"\frac{1}{2}", "difficulty": 5.0}, "2+3?", (r"\frac{1}{2}",)),
    (
        "math",
        {"problem": "2+3?", "level": "Level 1", "type": "Algebra", "solution": r"so $\boxed{\frac{1}{2}}$."},
        "2+3?",
        (r"\frac{1}{2}",),
    ),
    (
        "math-500",
        {"problem": "2+3?", "solution": "s", "answer": "5", "subject": "Algebra", "unique_id": "test/a/1.json"},
        "2+3?",
        ("5",),
    ),
    ("aime-train", {"problem": "2+3?", "answer": "060", "year": 1983}, "2+3?", ("60",)),
    ("aime24", {"id": 60, "problem": "2+3?", "solution": "s", "answer": "033", "year": "2024"}, "2+3?", ("33",)),
    ("aime24", {"ID": "2024-I-1", "Problem": "2+3?", "Solution": "s", "Answer": 204}, "2+3?", ("204",)),
    ("aime24", {"problem": "2+3?", "solution": r"\boxed{204}", "url": "u"}, "2+3?", ("204",)),
    ("aime24", {"input": "2+3?", "output": "45"}, "2+3?", ("45",)),
    ("aime25", {"problem": "2+3?", "answer": "70", "id": "0"}, "2+3?", ("70",)),
    ("aime25", {"question": "2+3?", "answer": "70"}, "2+3?", ("70",)),
    ("amc23", {"id": 0, "question": "2+3?", "answer": 27.0, "url": "u"}, "2+3?", ("27",)),
    ("amc23", {"problem": "2+3?", "answer": 142.0, "difficulty": 2.0}, "2+3?", ("142",)),
    ("minerva", {"question": "2+3?", "answer": "7.5 \\times 10^7\n"}, "2+3?", ("7.5 \\times 10^7",)),
    ("minerva", {"problem": "2+3?", "answer": ["0.01\n", "0.02\n"], "idx": 3}, "2+3?", ("0.01", "0.02")),
    ("minerva", {"problem": "2+3?", "answer": ["0.01", "0.01\n"], "idx": 3}, "2+3?", ("0.01",)),
    (
        "olympiadbench",
        {"id": 1606, "question": "Find.", "final_answer": ["$2$", "$5$"], "context": "Let there be.", "unit": None},
        "Let there be.\n\nFind.",
        ("2, 5",),
    ),
    (
        "olympiadbench",
        {"id": 1, "problem": "Find.", "answer": ["$\\frac{1}{2}$"], "context": None},
        "Find.",
        ("\\frac{1}{2}",),
    ),
]


def write(folder: Path, rows: list, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.fixture
def tool(tmp_path, capsys):
    """Runs the tool on rows; returns its exit code, what it wrote to both streams, and the output's path."""

    def run(dataset: str, rows: list | Path, *options: str | Path, name: str = "in.jsonl", out: str = "out.jsonl"):
        path = rows if isinstance(rows, Path) else write(tmp_path, rows, name)
        code = main([str(x) for x in ("prepare-data", dataset, "--file", path, "--out", tmp_path / out, *options)])
        said = capsys.readouterr()
        return code, said.out + said.err, tmp_path / out

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.parquet"])
@pytest.mark.parametrize(("dataset", "row", "text", "answers"), PUBLISHED)
def test_published_forms(tmp_path, dataset, row, text, answers, name):
    (found,) = extract.problems(RECIPES[dataset], write(tmp_path, [row], name))
    assert isinstance(found, Problem)
    assert (found.text, found.answers) == (text, answers)


def test_every_recipe_has_a_published_form_here():
    elsewhere = {row[0] for row in MORE + PROGRAMS}
    assert {dataset for dataset, *_ in PUBLISHED} == set(RECIPES) - elsewhere


def test_csv_and_its_ids(tmp_path):
    path = tmp_path / "aime.csv"
    path.write_text('ID,Year,Question,Answer\n1983-1,1983,"two\nlines",60\n1983-2,1983,short\n')
    first, second = extract.problems(RECIPES["aime-train"], path)
    assert (first.text, first.answers, first.published_id) == ("two\nlines", ("60",), "1983-1")
    assert second.line() == f"{path}:4: want 4 columns"


@pytest.mark.parametrize(
    ("dataset", "row", "field", "problem"),
    [
        ("gsm8k", {"question": "How many?"}, "answer", "missing; the row has question"),
        ("gsm8k", {"question": "How many?", "answer": None}, "answer", "null"),
        ("gsm8k", {"question": "How many?", "answer": "18"}, "answer", "no '####'"),
        ("gsm8k", {"question": "How many?", "answer": "#### eighteen"}, "answer", "want a number, got 'eighteen'"),
        ("gsm8k", {"question": " ", "answer": "#### 18"}, "question", "empty"),
        ("gsm8k", {"question": 3, "answer": "#### 18"}, "question", "want a string, got 3"),
        ("math", {"problem": "2+3?", "answer": ""}, "answer", "empty"),
        ("math", {"problem": "2+3?", "answer": ["5"]}, "answer", "want a string or a number"),
        ("aime24", {"problem": "2+3?", "answer": "1000"}, "answer", "want an integer from 0 to 999"),
        ("dapo-math-17k", DAPO | {"prompt": chat(f"{BEFORE}What?")}, "prompt", "only one half of the instruction"),
        ("dapo-math-17k", DAPO | {"prompt": []}, "prompt", "want one user message"),
        ("dapo-math-17k", DAPO | {"reward_model": {}}, "reward_model.ground_truth", "missing"),
        ("skywork-or1", SKYWORK | {"reward_model": {"ground_truth": "6"}}, "reward_model.ground_truth", "JSON list"),
        ("minerva", {"problem": "2+3?", "answer": []}, "answer", "an empty list"),
    ],
)
def test_a_malformed_field_is_named_with_its_line(tmp_path, dataset, row, field, problem):
    good = next(r for name, r, *_ in PUBLISHED if name == dataset)
    good = {"minerva": PUBLISHED[20][1]}.get(dataset, good)
    path = write(tmp_path, [good, row], "in.jsonl")
    _, found = extract.problems(RECIPES[dataset], path)
    assert isinstance(found, Malformed)
    assert (found.place, found.field) == (f"{path}:2", field)
    assert problem in found.problem
    assert found.line().startswith(f"{path}:2: field {field!r}: ")


def test_lines_of_a_json_array_and_rows_of_parquet(tmp_path):
    good, bad = {"problem": "2+3?", "answer": "5"}, {"problem": "2+3?", "answer": None}
    path = write(tmp_path, [good, bad, 7], "in.json")  # four lines an object, from line 2
    assert [x.place for x in extract.problems(RECIPES["math"], path)] == [f"{path}:{n}" for n in (2, 6, 10)]
    path = write(tmp_path, [good, bad], "in.parquet")
    assert [x.place for x in extract.problems(RECIPES["math"], path)] == [f"{path}:row 1", f"{path}:row 2"]
    path = write(tmp_path, ["", json.dumps(good), "", "{oops", "[1]"], "in.jsonl")
    _, broken, no_object = extract.problems(RECIPES["math"], path)
    assert broken.line().startswith(f"{path}:4: not valid JSON")
    assert no_object.line() == f"{path}:5: want one JSON object a row, got [1]"


def test_malformed_rows_are_refused_or_listed(tool):
    rows = [{"problem": "2+3?", "answer": "5"}, {"problem": "3+3?", "answer": None}, "{oops"]
    code, said, out = tool("math", rows)
    assert code == 2
    assert "in.jsonl:2: field 'answer': null\n" in said
    assert "in.jsonl:3: not valid JSON" in said
    assert "stare-megatron: 2 of 3 rows are malformed" in said
    assert not out.exists()
    code, said, out = tool("math", rows, "--skip-malformed")
    assert (code, len(lines(out))) == (0, 1)
    assert "1 of 3 rows; left out: 2 malformed" in said
    listed = lines(out.with_name("out.jsonl.malformed.jsonl"))
    assert [(r["field"], r["row"]) for r in listed] == [
        ("answer", '{"problem": "3+3?", "answer": null}'),
        ("", "{oops"),
    ]
    code, *_ = tool("math", rows[:1])
    assert code == 0
    assert not out.with_name("out.jsonl.malformed.jsonl").exists()  # the last run had none


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "2+3?"}], "columns text: math has problem and answer or problem and solution"),
        ([], "in.jsonl: the file is empty"),
        ([""], "in.jsonl: no rows"),
        (Path("none.jsonl"), "none.jsonl: cannot read it: No such file"),
        (Path("none.txt"), "none.txt: want a file that ends in .jsonl"),
    ],
)
def test_unusable_files_are_one_line(tool, rows, message):
    code, said, _ = tool("math", rows)
    assert code == 2
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_broken_array_names_its_line(tool, tmp_path):
    (tmp_path / "in.json").write_text('[\n{"problem": "2+3?", "answer": "5"},\n{"problem": oops}]')
    code, said, _ = tool("math", tmp_path / "in.json")
    assert (code, "in.json:3: not valid JSON" in said) == (2, True)


def test_repetitions_and_conflicts(tool):
    rows = [
        {"problem": r"What is $\dfrac{1}{2}+x$?", "answer": r"\frac12"},
        {"problem": r"what is  \(\frac{1}{2} + x\)", "answer": r"$\frac{1}{2}$"},  # the same, also its answer
        {"problem": r"What is $\frac{1}{2}-x$?", "answer": "7"},
        {"problem": "Contested?", "answer": "1"},
        {"problem": "contested ?", "answer": "2"},
    ]
    code, said, out = tool("math", rows)
    assert code == 0
    assert "2 of 5 rows; left out: 1 repeated, 2 with conflicting answers" in said
    assert [r["answer"] for r in lines(out)] == [r"\frac12", "7"]
    reasons = [r["reason"] for r in lines(out.with_name("out.jsonl.removed.jsonl"))]
    assert "whose answer is '1', not '2'" in reasons[0]
    assert "another answer than '1'" in reasons[1]
    _, said, out = tool("math", rows, "--conflicts", "first")
    assert [r["answer"] for r in lines(out)] == [r"\frac12", "7", "1"]
    assert "1 with conflicting answers" in said


def test_dapo_shrinks_to_its_distinct_problems(tool):
    other = DAPO | {
        "prompt": chat(f"{BEFORE}What is 1 + 1?{AFTER}"),
        "reward_model": {"ground_truth": "2", "style": ""},
    }
    _, said, out = tool("dapo-math-17k", [DAPO, other] * 100, name="in.parquet")
    assert "2 of 200 rows; left out: 198 repeated" in said
    first = lines(out)[0]
    assert first["published_id"] == "9a9b6eb4-0000"
    assert first["prompt"].startswith("What is 17 + 17?\nPlease reason step by step")


EVAL = (
    "A frog jumps along the number line from zero to twelve in steps of two or three; in how many ways can it arrive?"
)


def test_benchmarks_are_kept_out_and_listed(tool):
    _, _, benchmark = tool(
        "aime24", [{"problem": EVAL, "answer": "7"}, {"problem": "2+3?", "answer": "5"}], out="e.jsonl"
    )
    words = EVAL.split()
    rows = [
        {"problem": EVAL.upper(), "answer": "7"},
        {"problem": f"{EVAL} Give your answer as a fraction in lowest terms.", "answer": "7"},
        {"problem": " ".join([*words[:10], "seventeen", *words[11:]]), "answer": "8"},  # one word in the middle
        {"problem": "2-3?", "answer": "-1"},  # short: a sign apart is another problem
        {"problem": "$2 + 3$", "answer": "5"},
    ]
    code, said, out = tool("math", rows, "--against", benchmark)
    assert code == 0
    assert "2 of 5 rows; left out: 2 equal to a problem of --against, 1 overlapping with one" in said
    assert [r["answer"] for r in lines(out)] == ["8", "-1"]
    removed = lines(out.with_name("out.jsonl.removed.jsonl"))
    reference = lines(benchmark)[0]["id"]
    assert removed[0]["reason"] == f"same text as {reference} (aime24)"
    assert removed[1]["reason"] == f"shares 1.00 of its 13-grams with {reference} (aime24)"
    manifest = json.loads(out.with_name("out.jsonl.manifest.json").read_text())
    assert manifest["counts"] == {
        "rows": 5,
        "malformed": 0,
        "unsuitable": 0,
        "repeated": 0,
        "conflicting": 0,
        "same": 2,
        "overlapping": 1,
        "written": 2,
    }
    assert manifest["against"][0]["sha256"] == hashlib.sha256(benchmark.read_bytes()).hexdigest()
    code, said, _ = tool("math", rows, "--against", benchmark, "--ngram", "5", "--overlap", "0.3")
    assert "2 overlapping" in said


def test_against_takes_prepared_files_only(tool, tmp_path):
    raw = write(tmp_path, [{"question": "2+3?"}], "raw.jsonl")
    code, said, _ = tool("math", [{"problem": "2+3?", "answer": "5"}], "--against", raw)
    assert code == 2
    assert "raw.jsonl:1: no text in column 'id'" in said


def test_phrases_of_many_benchmark_problems_do_not_count():
    phrase = "can be written as m over n where m and n are relatively prime positive integers find m plus n"
    starts = [f"number {i} the area of shape {i * 7} in the plane" for i in range(6)]
    references = [Reference(str(i), "s", f"{start} {phrase}") for i, start in enumerate(starts)]
    other = f"the sum of all odd things {phrase}"
    assert Contamination(references[:2], 13, 0.2, 5).find(other) is not None
    assert Contamination(references, 13, 0.2, 5).find(other) is None
    hit = Contamination(references * 9, 13, 0.2, 5).find(
        references[3].text + " today"
    )  # repeated references count once
    assert hit is not None
    assert hit.reference.id == "3"


def test_keys_keep_signs_and_drop_layout():
    assert overlap.key(r"Let \(x = \left( 1,2 \right)\).") == overlap.key("let $x=(1,2)$")
    assert overlap.key("x+1") != overlap.key("x-1")
    assert overlap.answer_key(r"\dfrac12") == overlap.answer_key(r"\frac{1}{2}")
    assert overlap.answer_key(r"\mathbf{2340}") == "2340"
    assert overlap.answer_key(r"\frac{1}{33}") != overlap.answer_key(r"\frac{13}{3}")


def test_output_is_the_same_each_time_and_loads(tool):
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(20)]
    _, _, a = tool("math", rows, out="a.jsonl")
    _, _, b = tool("math", rows, out="b.jsonl")
    assert a.read_bytes() == b.read_bytes()
    assert [r["answer"] for r in lines(a)] == [r["answer"] for r in rows]
    manifest = json.loads(a.with_name("a.jsonl.manifest.json").read_text())
    assert manifest["output"]["sha256"] == hashlib.sha256(a.read_bytes()).hexdigest()
    assert manifest["files"][0]["name"] == "in.jsonl"
    assert manifest["settings"]["ngram"] == 13
    assert list(a.parent.glob("*.partial")) == []
    prompts = load_prompts(DataConfig(train=[a]), make_tokenizer(get("order_free_sum")))
    assert len(prompts) == 20
    assert (prompts[3].answer, prompts[3].source) == ("6", "math")


def test_forms_of_the_prompt(tool):
    row = {"problem": "2+3?", "answer": "5"}
    _, _, out = tool("math", [row], "--form", "chat", "--system", "Be brief.", "--instruction", "", "--source", "sums")
    assert lines(out)[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+3?"},
    ]
    assert lines(out)[0]["source"] == "sums"
    code, said, _ = tool("math", [row], "--system", "Be brief.")
    assert (code, "--system needs --form chat" in said) == (2, True)
    code, said, _ = tool("math", [row], "--overlap", "0")
    assert (code, "--overlap above 0" in said) == (2, True)


def test_alternatives_are_written_as_the_reward_reads_them(tool):
    _, _, out = tool("minerva", [{"problem": "2+3?", "answer": ["0.01\n", "0.02\n"], "idx": 3}])
    assert lines(out)[0]["answer"] == '["0.01", "0.02"]'


def test_nothing_left_is_an_error(tool):
    row = {"problem": EVAL, "answer": "7"}
    _, _, benchmark = tool("aime24", [row], out="e.jsonl")
    code, said, _ = tool("math", [row], "--against", benchmark)
    assert (code, "nothing left to write of 1 rows" in said) == (2, True)


def test_a_half_written_output_is_never_there(tool, tmp_path):
    (tmp_path / "out.jsonl.partial").mkdir()  # writing fails
    code, said, out = tool("math", [{"problem": "2+3?", "answer": "5"}])
    assert (code, "cannot be written" in said) == (2, True)
    assert not out.exists()


def test_unknown_layout_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="columns a: aime25 has"):
        list(extract.problems(RECIPES["aime25"], write(tmp_path, [{"a": 1}], "in.jsonl")))
