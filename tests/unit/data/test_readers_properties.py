"""Rows of data: each is read as it stands, or refused by name of its file and line; nothing else is raised."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stare_megatron.config import DataConfig
from stare_megatron.data.prepare.read import read
from stare_megatron.data.prepare.types import Malformed, RawRow
from stare_megatron.data.prompts import PromptSet, load_prompts
from stare_megatron.errors import UserError
from tests import byte_tokenizer
from tests.properties import SCALARS, TEXT, bounded, nested

TOKENIZER = byte_tokenizer.make()
# What a template may do with a message beyond what this checks: arithmetic, lookups, filters.
HOSTILE = byte_tokenizer.make("{% for m in messages %}{{ m.content + m.role }}{{ (m.n | int) + m.k }}{% endfor %}")

ANY = nested(SCALARS)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "system"]) | ANY, "content": TEXT | ANY, "k": ANY, "n": ANY}
    ),
    max_size=3,
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXT | MESSAGES | ANY,
        "answer": TEXT | st.integers() | st.floats() | ANY,
        "id": TEXT | ANY,
        "source": TEXT | ANY,
        "more": ANY,
    },
)
LINES = ROWS.map(json.dumps) | ANY.map(json.dumps) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
LONG = [
    '{"prompt": "a", "answer": ' + "9" * 5000 + "}",
    "[" * 100_000,
    '{"a": ' * 5000,
    '{"prompt": "a", "answer": 1e999}',
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def load(path: Path, tokenizer: Any = TOKENIZER, **settings: Any) -> PromptSet | str:
    """The prompts, or what the file is refused with: one line that names it."""
    try:
        return load_prompts(DataConfig(train=[path], **settings), tokenizer)
    except UserError as e:
        said = str(e)
    assert said.startswith(str(path))
    assert "\n" not in said
    assert said.encode()
    return said


@bounded(250)
@given(st.lists(LINES, min_size=1, max_size=3), st.booleans(), st.booleans())
@example(LONG[:1], False, False)
@example(LONG[1:2], False, False)
@example(LONG[2:3], False, False)
@example(LONG[3:4], False, False)
@example(['{"prompt": "a", "answer": NaN}'], False, False)
@example(['\ufeff{"prompt": "a", "answer": "b"}'], False, False)
def test_any_lines(folder: Path, lines: list[str], template: bool, hostile: bool) -> None:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = load(path, HOSTILE if hostile else TOKENIZER, chat_template=template)
    if isinstance(found, str):
        assert found.startswith((f"{path}:", f"{path}: no prompts")), found
    else:
        for i in range(len(found)):
            assert found[i].token_ids


@bounded(150)
@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 2))
def test_the_line_that_is_named_is_the_one_at_fault(folder: Path, rows: list[dict[str, Any]], place: int) -> None:
    """Good rows around one: it is read, or refused with its own line."""
    good = [{"prompt": f"good {i}", "answer": str(i), "id": f"good {i}"} for i in range(3)]
    path = folder / "place.jsonl"
    for row in rows:
        lines = [*good[:place], row, *good[place:]]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = load(path)
        if isinstance(found, str):
            assert found.startswith(f"{path}:{place + 1}: ")
        else:
            assert len(found) + found.dropped == 4
            taken = found[place]
            assert isinstance(row["prompt"], list) or taken.text == row["prompt"]
            answer = row["answer"]
            assert float(taken.answer) == answer if isinstance(answer, float) else taken.answer == str(answer)


CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
COLUMNS = st.sampled_from(
    [
        (pa.string(), TEXT.map(lambda t: t.encode("utf-8", "ignore").decode())),
        (pa.binary(), st.binary(max_size=6)),
        (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
        (pa.float64(), st.floats()),
        (pa.bool_(), st.booleans()),
        (pa.timestamp("us"), st.integers(-(2**62), 2**62)),
        (pa.timestamp("ns"), st.integers(-(2**62), 2**62)),
        (pa.date32(), st.integers(-(2**30), 2**30)),
        (pa.duration("s"), st.integers(-(2**62), 2**62)),
        (CHAT, st.sampled_from([[{"role": "user", "content": "hi"}], [{"role": "user", "content": None}], []])),
        (pa.map_(pa.string(), pa.int64()), st.just([("a", 1), ("a", 2)])),
    ]
)


@bounded(150)
@given(st.dictionaries(st.sampled_from(["prompt", "answer", "id", "source"]), COLUMNS, min_size=1), st.data())
def test_any_parquet(folder: Path, columns: dict[str, Any], data: Any) -> None:
    path = folder / "rows.parquet"
    arrays = {
        name: pa.array(data.draw(st.lists(st.none() | values, min_size=2, max_size=2)), kind)
        for name, (kind, values) in columns.items()
    }
    pq.write_table(pa.table(arrays), path)
    load(path)
    rows(path)


@bounded(60)
@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=3))
@example(changes=[(138, 128)])  # in a column's name
def test_damaged_parquet(folder: Path, changes: list[tuple[int, int]]) -> None:
    path = folder / "damaged.parquet"
    pq.write_table(
        pa.table({"prompt": ["a", "b"], "answer": ["é", "2"]}), path, compression="none", use_dictionary=False
    )
    raw = bytearray(path.read_bytes())
    for place, byte in changes:
        raw[place % len(raw)] = byte
    path.write_bytes(raw)
    load(path)


def test_text_of_parquet_that_is_not_utf_8(folder: Path) -> None:
    path = folder / "latin.parquet"
    pq.write_table(
        pa.table({"prompt": ["aéb", "b"], "answer": ["1", "2"]}), path, compression="none", use_dictionary=False
    )
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9b"))
    assert f"{path}:1: key 'prompt': a value that cannot be read" in str(load(path))


def rows(path: Path) -> list[RawRow | Malformed]:
    """As `prepare` reads a file; nothing of one that is refused as a whole."""
    try:
        found = list(read(path))
    except UserError as e:
        said = str(e)
    else:
        for row in found:
            assert row.place.startswith(f"{path}:")
            assert not isinstance(row, Malformed) or row.line().encode()
        return found
    assert said.startswith(str(path))
    assert "\n" not in said
    return []


@bounded(150)
@given(st.lists(LINES, max_size=4), st.booleans())
@example(LONG, False)
@example(LONG, True)
def test_any_rows_of_published_json(folder: Path, lines: list[str], array: bool) -> None:
    path = folder / "published.json"
    path.write_text("[" + ",\n".join(lines) + "]" if array else "\n".join(lines), encoding="utf-8")
    for row in rows(path):
        assert isinstance(row, Malformed) or json.dumps(row.fields, ensure_ascii=False).encode()


@bounded(100)
@given(st.lists(st.lists(TEXT, max_size=3), max_size=4), st.binary(max_size=4))
@example([["problem", "answer"], ["a" * 200_000, "1"]], b"")
@example([["problem", "answer"], ["1+1", "2"]], b"\xef\xbb\xbf")
def test_any_rows_of_csv(folder: Path, table: list[list[str]], before: bytes) -> None:
    out = io.StringIO()
    csv.writer(out).writerows(table)
    path = folder / "published.csv"
    path.write_bytes(before + out.getvalue().encode("utf-8", "replace"))
    rows(path)


def test_a_byte_order_mark_is_no_part_of_a_file(folder: Path) -> None:
    for name, text in (("bom.csv", "problem,answer\n1+1,2\n"), ("bom.jsonl", '{"problem": "1+1", "answer": "2"}\n')):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        (row,) = rows(folder / name)
        assert isinstance(row, RawRow)
        assert row.fields == {"problem": "1+1", "answer": "2"}
