"""Published rows of any content: each is used, counted as malformed with its place, or ends the preparation by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron.__main__ import main
from stare_megatron.config import DataConfig
from stare_megatron.data.prepare.hub import Source
from stare_megatron.data.prepare.pipeline import prepare
from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.data.prepare.settings import Settings
from stare_megatron.data.prompts import load_prompts
from stare_megatron.errors import UserError
from tests import byte_tokenizer
from tests.properties import SCALARS, TEXT, bounded, nested

TOKENIZER = byte_tokenizer.make()
ANY = nested(SCALARS)
ANSWERS = st.sampled_from(["5", "\\boxed{5}", "#### 5", '["5"]', ["5", 6.0], 5, 1e17, "$", "\u200b", "#### ,"]) | ANY
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user") | ANY, "content": TEXT | ANY}), max_size=2)
ROWS = st.fixed_dictionaries(
    {"problem": TEXT | MESSAGES | ANY, "answer": ANSWERS},
    optional={"id": ANY, "idx": ANY, "unique_id": ANY, "context": ANY, "solution": ANSWERS, "modality": ANY},
)
CHATS = st.fixed_dictionaries(
    {"prompt": MESSAGES | TEXT, "reward_model": st.fixed_dictionaries({"ground_truth": ANSWERS}) | ANY},
    optional={"extra_info": st.fixed_dictionaries({"index": ANY}) | ANY},
)


def settings(**changed: Any) -> Settings:
    kept: dict[str, Any] = {"form": "text", "instruction": "", "system": "", "source": "", "against": (), "ngram": 3}
    kept |= {"overlap": 0.5, "common": 5, "conflicts": "first", "skip_malformed": True}
    return Settings(**(kept | changed))


@bounded(250)
@given(st.sampled_from(sorted(RECIPES)), st.lists(ROWS | CHATS, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_what_is_written_can_be_loaded(
    tmp_path_factory: pytest.TempPathFactory, name: str, rows: list[Any], chat: bool, array: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "prepared"
    folder.mkdir(exist_ok=True)
    file, out = folder / "in.json", folder / "out.jsonl"
    rows = [*rows, {"problem": "What is 2+3?", "answer": "5", "solution": "\\boxed{5}"}]
    file.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    try:
        made = settings(form="chat") if chat else settings()
        counts = prepare(RECIPES[name], Source("", (file,)), made, out, said.append)
    except UserError as e:
        said.append(str(e))
    else:
        assert len(load_prompts(DataConfig(train=[out], max_prompt_tokens=10**6), TOKENIZER)) == counts.written
        assert counts.rows == len(rows)
    assert all(line.startswith(f"{file}") for line in said)
    assert all("\n" not in line and line.encode() for line in said)


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, raw: bytes, *options: str) -> tuple[int, str]:
    (tmp_path / name).write_bytes(raw)
    dataset = "aime-train" if name.endswith(".csv") else "math-500"
    command = ["prepare-data", dataset, "--file", str(tmp_path / name), "--out", str(tmp_path / "out.jsonl")]
    code = main([*command, "--skip-malformed", *options])
    return code, capsys.readouterr().err


GOOD = b'{"problem": "What is 2+3?", "answer": "5"}\n'


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b'{"problem": "1+1?", "answer": NaN}', "field 'answer': want a finite number"),
        (b'{"problem": "1+1?", "answer": 1e999}', "field 'answer': want a finite number"),
        (b'{"problem": "1+1?", "answer": ' + b"2" * 5000 + b"}", "field 'answer': want a finite number"),
        (b'{"problem": "1+1?", "answer": "  "}', "field 'answer': empty"),
        (b'{"problem": "1+1?", "answer": "$\\u200b$"}', "field 'answer': empty"),
        (b'{"problem": "\\u200b", "answer": "2"}', "field 'problem': empty"),
        (b'{"problem": "1+1?", "answer": "2", "unique_id": [1]}', "field 'unique_id': want a string"),
        (b'{"problem": "1+1?", "answer": "2", "context": ["x"]}', "field 'context': want a string"),
        (b'{"problem": "[{\'role\': \'user\'}]", "answer": "2"}', "field 'problem': messages written as one string"),
        (b'{"problem": "1+1?", "answer": "2", "answer": "3"}', "the key 'answer' twice"),
        (b'{"problem": "1+1? \\udc00", "answer": "2"}', "half a surrogate pair"),
        (b'{"problem": "1+1? \xe9", "answer": "2"}', "not UTF-8"),
        (b'{"problem": ' + b"[" * 100_000, "nested too deep"),
        (b'{"problem": ' + b"[" * 300 + b"]" * 300 + b', "answer": "2"}', "field 'problem': want one user message"),
    ],
)
def test_malformed_rows_are_skipped_by_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: bytes, why: str
) -> None:
    code, said = run(tmp_path, capsys, "in.jsonl", GOOD + row + b"\n")
    assert code == 0
    assert said.startswith(f"{tmp_path}/in.jsonl:2: ")
    assert why in said
    assert len(load_prompts(DataConfig(train=[tmp_path / "out.jsonl"]), TOKENIZER)) == 1
    (listed,) = (tmp_path / "out.jsonl.malformed.jsonl").read_text().splitlines()
    assert json.loads(listed)["place"] == f"{tmp_path}/in.jsonl:2"


@pytest.mark.parametrize(
    ("name", "raw", "why"),
    [
        ("in.json", b"[" + GOOD + b"]\n[" + GOOD + b"]", "in.json:2: not valid JSON: text after the array"),
        ("in.json", b"[" + GOOD + GOOD + b"]", "No comma, or one too many"),
        ("in.jsonl", gzip.compress(GOOD), "in.jsonl: compressed; unpack it"),
        ("in.parquet", b"version https://git-lfs.github.com/spec/v1\n", "in.parquet: a Git LFS pointer"),
        ("in.csv", b"", "in.csv: the file is empty"),
        ("in.csv", b"<!doctype html>", "in.csv: a web page"),
        ("in.csv", "problem,answer\n1+1?,2\n".encode("utf-16"), "in.csv: UTF-16"),
        ("in.csv", b"problem,answer,answer\n1+1?,2,3\n", "in.csv:1: two columns are called 'answer'"),
        ("in.csv", b'problem,answer\n1+1?,2\n"1+2?,3\n1+3?,4\n', "in.csv:3: not readable as CSV"),
        ("in.csv", b"problem,answer\n1+1\xe9?,2\n", "in.csv: not UTF-8"),
    ],
)
def test_files_that_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, raw: bytes, why: str) -> None:
    code, said = run(tmp_path, capsys, name, raw)
    assert (code, why in said) == (2, True), said
    assert not (tmp_path / "out.jsonl").exists()


def test_long_cells_and_rows_of_another_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = b"x" * 300_000
    raw = b"\xef\xbb\xbfproblem,answer\r\n" + long + b'?,2\r\n1+1?,2,3\r\n1+1?\r\n"two\r\nlines?",4\r\n'
    code, said = run(tmp_path, capsys, "in.csv", raw)
    assert code == 0
    assert [line.rpartition("/")[2].split(": ")[0] for line in said.splitlines()] == ["in.csv:3", "in.csv:4"]
    found = load_prompts(DataConfig(train=[tmp_path / "out.jsonl"], max_prompt_tokens=10**6), TOKENIZER)
    assert len(found) == 2


def test_numbers_of_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.parquet"
    problems = pa.array(["a?", "b?", "c?"])
    pq.write_table(pa.table({"problem": problems, "answer": pa.array([1e17, 0.5, float("nan")])}), path)
    code, said = run(tmp_path, capsys, path.name, path.read_bytes())
    assert code == 0
    assert f"{path}:row 3: field 'answer': want a finite number" in said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["100000000000000000", "0.5"]


@pytest.mark.parametrize("option", ["--source", "--system", "--instruction"])
@pytest.mark.parametrize("text", ["a \udcff", "  "])
def test_options_that_no_row_can_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, text: str
) -> None:
    code, said = run(tmp_path, capsys, "in.jsonl", GOOD, "--form", "chat", option, text)
    assert (code, option in said, said.count("\n")) == (2, True, 1)
