"""What a row may hold: each value is used as it is meant, or refused with file, line and key."""

from __future__ import annotations

import contextlib
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stare_megatron.config import DataConfig
from stare_megatron.data.prompts import PromptSet, load_prompts
from stare_megatron.errors import UserError
from tests import byte_tokenizer

TOKENIZER = byte_tokenizer.make()
QWEN = byte_tokenizer.make(
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content | trim }}"
    "{% endif %}<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n"
)
USER = {"role": "user", "content": "What is 2+2?"}


def load(folder: Path, *rows: Any, tokenizer: Any = TOKENIZER, name: str = "p.jsonl", **settings: Any) -> PromptSet:
    path = folder / name
    lines = (row if isinstance(row, bytes) else (json.dumps(row) + "\n").encode() for row in rows)
    path.write_bytes(b"".join(lines))
    return load_prompts(DataConfig(train=[path], **settings), tokenizer)


def table(folder: Path, columns: dict[str, pa.Array], **settings: Any) -> PromptSet:
    path = folder / "p.parquet"
    pq.write_table(pa.table(columns), path)
    return load_prompts(DataConfig(train=[path], **settings), TOKENIZER)


def said(folder: Path, *rows: Any, **settings: Any) -> str:
    """What the file is refused with, after its name."""
    with pytest.raises(UserError) as e:
        load(folder, *rows, **settings)
    text = str(e.value)
    assert text.startswith(f"{folder / settings.get('name', 'p.jsonl')}:"), text
    assert text.isprintable(), text
    return text.removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("1e17", "100000000000000000"),
        ("1E23", "100000000000000000000000"),
        ("18.0", "18"),
        ("-0.0", "0"),
        ("0.1", "0.1"),
        ("1e-7", "0.0000001"),
        ("-2.50", "-2.5"),
        ("9" * 4000, "9" * 4000),
        ('" 5 "', " 5 "),
        ('"5.0"', "5.0"),
        ('"\\ud83d\\ude00"', "😀"),
    ],
)
def test_an_answer_keeps_its_digits(tmp_path: Path, value: str, answer: str) -> None:
    assert load(tmp_path, f'{{"prompt": "a b", "answer": {value}}}'.encode())[0].answer == answer


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("NaN", "want a finite number"),
        ("-Infinity", "want a finite number"),
        ("1e400", "want a finite number"),
        ("1" * 5000, "want a finite number"),
        ('""', "empty or blank"),
        ('"  \\n"', "empty or blank"),
        ('"\\u200b\\ufeff"', "empty or blank"),
        ("true", "want a string or a number, got True"),
        ("null", "want a string or a number, got None"),
        ('["4", "5"]', "want a string or a number, got ['4', '5']"),
        ('{"value": 4}', "want a string or a number, got {'value': 4}"),
        ("[" * 90 + "]" * 90, "want a string or a number, got [[[[[["),
    ],
)
def test_an_answer_that_is_none(tmp_path: Path, value: str, why: str) -> None:
    row = f'{{"prompt": "a b", "answer": {value}}}'.encode()
    assert f"p.jsonl:1: key 'answer': {why}" in said(tmp_path, row)
    row = f'{{"prompt": "a b", "answer": "1", "uid": {value}}}'.encode()
    assert f"p.jsonl:1: key 'uid': {why}" in said(tmp_path, row, id_key="uid")


def test_values_nobody_reads_do_no_harm(tmp_path: Path) -> None:
    row = b'{"prompt": "a b", "answer": "1", "x": NaN, "y": -Infinity, "z": ' + b"1" * 5000 + b"}"
    assert load(tmp_path, row)[0].answer == "1"
    assert "p.jsonl:1: key 'x': data.extra_keys: a value that JSON cannot" in said(tmp_path, row, extra_keys=["x"])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b'{"prompt": "a \\ud83d", "answer": "1"}', "half a surrogate pair"),
        (b'{"prompt": "a", "answer": "1", "\\udc00": 1}', "half a surrogate pair"),
        (b'{"prompt": "a", "answer": "1", "answer": "2"}', "the key 'answer' twice in one object"),
        (b'{"prompt": "\xe9", "answer": "1"}', "not UTF-8"),
        (b'{"prompt": "a", "answer": "1"', "not valid JSON"),
        (b'{"prompt": "a", "answer": "1"} {"prompt": "b", "answer": "2"}', "Extra data"),
        (b'"a string"', "want one JSON object a row"),
        (b'{"a": ' * 100_000, "not valid JSON: nested too deep"),
    ],
)
def test_lines_that_are_no_rows(tmp_path: Path, row: bytes, why: str) -> None:
    good = {"prompt": "a b", "answer": "1"}
    text = said(tmp_path, good, b"\r\n\n", row + b"\n", good)
    assert text.startswith("p.jsonl:4: ")
    assert why in text


def test_a_row_as_deep_as_json_may_be(tmp_path: Path) -> None:
    """What reading allows, writing and showing it may not."""
    for depth in range(850, 1000, 10):
        deep = b'{"prompt": "a", "answer": "1", "x": ' + b"[" * depth + b"]" * depth + b"}"
        for settings in ({}, {"extra_keys": ["x"]}, {"prompt_key": "x"}, {"answer_key": "x"}):
            with contextlib.suppress(UserError):
                load(tmp_path, deep, **settings)


@pytest.mark.parametrize("prompt", ["", " \n\t", "\u200b", [], [{"role": "user", "content": " "}], {}, None, 5, True])
def test_a_prompt_that_is_none(tmp_path: Path, prompt: Any) -> None:
    assert "p.jsonl:1: key 'prompt': " in said(tmp_path, {"prompt": prompt, "answer": "1"})
    assert "p.jsonl:1: key 'prompt': " in said(tmp_path, {"prompt": prompt, "answer": "1"}, chat_template=True)


@pytest.mark.parametrize("write", [json.dumps, repr, lambda m: json.dumps(m, indent=1)])
def test_messages_written_as_a_string(tmp_path: Path, write: Any) -> None:
    text = said(tmp_path, {"prompt": write([USER]), "answer": "1"})
    assert "key 'prompt': messages written as one string; store the list itself" in text
    assert load(tmp_path, {"prompt": "[1, 2] and [{a}]?", "answer": "1"})[0].text == "[1, 2] and [{a}]?"


@pytest.mark.parametrize(
    "content", [None, 5, True, "missing", [{"type": "text", "text": "hi"}], ["hi"], {"text": "hi"}], ids=repr
)
def test_content_that_is_no_text(tmp_path: Path, content: Any) -> None:
    message = {"role": "user"} | ({} if content == "missing" else {"content": content})
    text = said(tmp_path, {"prompt": [USER, message], "answer": "1"})
    assert "key 'prompt': message 2: want messages with 'role' and 'content', texts; the content is" in text


@pytest.mark.parametrize("role", ["human", "User", "user ", "gpt", "tool", "developer", "function", ""])
def test_a_role_the_template_does_not_know(tmp_path: Path, role: str) -> None:
    for content in ("What is 2+2?", "assistant"):  # the second is in the text for another reason
        row = {"prompt": [{"role": role, "content": content}], "answer": "1"}
        assert f"leaves out the message of role {role!r}" in said(tmp_path, row, tokenizer=QWEN)
        row["prompt"] = [{"role": role, "content": content}, {"role": "user", "content": content}]
        assert f"leaves out the message of role {role!r}" in said(tmp_path, row, tokenizer=QWEN)


def test_what_a_template_may_do_to_a_message(tmp_path: Path) -> None:
    """White space around it, its place, what an assistant thought before."""
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "\n  first\n\tline \n"},
        {"role": "assistant", "content": "<think>hm</think>\n\nwell"},
        USER | {"name": None},
    ]
    text = load(tmp_path, {"prompt": messages, "answer": "1"}, tokenizer=QWEN)[0].text
    assert "first\n\tline<|im_end|>" in text
    assert "hm" not in text
    moved = byte_tokenizer.make("{{ messages[1].content }}{{ messages[0].content }}{{ messages[2].content | tojson }}")
    prompt = [{"role": "system", "content": "be brief"}, USER, {"role": "tool", "content": 'a "b"\nc'}]
    assert "be brief" in load(tmp_path, {"prompt": prompt, "answer": "1"}, tokenizer=moved)[0].text
    last = byte_tokenizer.make("{{ messages[-1].content }}")
    assert "role 'system'" in said(tmp_path, {"prompt": prompt, "answer": "1"}, tokenizer=last)
    cut = byte_tokenizer.make("{% for m in messages %}{{ m.content[:20] }}{% endfor %}")
    row = {"prompt": [USER | {"content": "a long question, all of which matters"}], "answer": "1"}
    assert "role 'user'" in said(tmp_path, row, tokenizer=cut)


def test_a_prompt_that_ends_with_the_answer(tmp_path: Path) -> None:
    row = {"prompt": [USER, {"role": "assistant", "content": "4"}], "answer": "4"}
    assert "the last message is the assistant's" in said(tmp_path, row)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{% if %}", "{{ messages.x.y }}", "{{ raise_exception('a\nb') }}", "{% include 'x' %}", "constant"],
)
def test_a_damaged_template(tmp_path: Path, template: str) -> None:
    made = byte_tokenizer.make(template)
    assert "p.jsonl:1: key 'prompt': " in said(tmp_path, {"prompt": [USER], "answer": "1"}, tokenizer=made)


def test_every_key_may_be_dotted(tmp_path: Path) -> None:
    row = {"a": {"p": "x y", "r": 1.0, "i": 12, "s": "gsm", "e": [1]}, "a.s": "literal"}
    keys = {"prompt_key": "a.p", "answer_key": "a.r", "id_key": "a.i", "source_key": "a.s", "extra_keys": ["a.e"]}
    found = load(tmp_path, row, **keys)[0]
    assert (found.text, found.answer, found.id, found.source, found.extra) == (
        "x y",
        "1",
        "12",
        "literal",
        {"a.e": [1]},
    )


@pytest.mark.parametrize("name", ["prompt_key", "answer_key", "id_key", "source_key"])
@pytest.mark.parametrize("key", ["uiid", "a.b", "prompt.x", "id."])
def test_a_key_no_row_has(tmp_path: Path, name: str, key: str) -> None:
    row = {"prompt": "a b", "answer": "1", "id": "x", "source": "s"}
    assert f"p.jsonl:1: no key {key!r}; the row has 'prompt'" in said(tmp_path, row, **{name: key})


def test_parquet_columns(tmp_path: Path) -> None:
    prompt = pa.array(["a", "b"]).dictionary_encode()
    decimals = pa.array([Decimal("5.00"), Decimal("-0.250")], pa.decimal128(9, 3))
    found = table(tmp_path, {"prompt": prompt, "answer": decimals})
    assert [found[i].answer for i in range(2)] == ["5", "-0.25"]
    halves = pa.array([1.0, 2.5])  # as pandas writes whole numbers beside missing ones
    assert [table(tmp_path, {"prompt": prompt, "answer": halves})[i].answer for i in range(2)] == ["1", "2.5"]
    for odd, what in (
        (pa.array([b"1", b"2"]), "b'1'"),
        (pa.array([1, 2], pa.timestamp("s")), "datetime"),
        (pa.array([[1], [2]]), "[1]"),
        (pa.array([None, None], pa.string()), "None"),
        (pa.array([float("nan"), 1.0]), "finite"),
    ):
        with pytest.raises(UserError, match=r"p\.parquet:1: key 'answer': want a .*") as e:
            table(tmp_path, {"prompt": prompt, "answer": odd})
        assert what in str(e.value)
    with pytest.raises(UserError, match=r"p\.parquet:2: key 'answer': a value that cannot be read"):
        table(tmp_path, {"prompt": prompt, "answer": pa.array([0, 2**62], pa.timestamp("us"))}, answer_key="prompt")
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_arrays([prompt, prompt], ["prompt", "prompt"]), path)
    with pytest.raises(UserError, match=r"p\.parquet: two columns are called 'prompt'"):
        load_prompts(DataConfig(train=[path]), TOKENIZER)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), path)
    with pytest.raises(UserError, match=r"p\.parquet: no prompts: the data set is empty"):
        load_prompts(DataConfig(train=[path]), TOKENIZER)


def test_messages_of_parquet_have_all_keys_of_the_column(tmp_path: Path) -> None:
    strict = byte_tokenizer.make(
        "{% for m in messages %}{{ m.content }}{{ m.name | length if 'name' in m }}{% endfor %}"
    )
    path = tmp_path / "p.parquet"
    rows = [{"prompt": [{"role": "system", "content": "x", "name": "n"}, USER], "answer": "1"}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert load_prompts(DataConfig(train=[path]), strict)[0].text == "x1What is 2+2?"


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (gzip.compress(b'{"prompt": "a", "answer": "1"}'), "compressed; unpack it"),
        (b"\x28\xb5\x2f\xfd and so on", "compressed; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\n  <HTML>", "a web page"),
        ('{"prompt": "a", "answer": "1"}'.encode("utf-16"), "UTF-16 or UTF-32 text"),
    ],
    ids=["empty", "gzip", "zstd", "lfs", "html", "HTML", "utf-16"],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    assert why in said(tmp_path, content, name=name)


def test_a_folder_and_a_file_of_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match=r"d\.jsonl: cannot read it: Is a directory"):
        load_prompts(DataConfig(train=[tmp_path / "d.jsonl"]), TOKENIZER)
    load(tmp_path, {"prompt": "a", "answer": "1"}, name="good.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n \r\n")
    with pytest.raises(UserError, match=r"blank\.jsonl: no prompts"):
        load_prompts(DataConfig(train=[tmp_path / "good.jsonl", tmp_path / "blank.jsonl"]), TOKENIZER)


def test_byte_order_marks_line_ends_and_arrays(tmp_path: Path) -> None:
    row = b'{"prompt": "a b", "answer": "1"}'
    for content in (b"\xef\xbb\xbf" + row, row + b"\r\n\r\n", b"\xef\xbb\xbf" + row + b"\n\xef\xbb\xbf" + row + b"\n"):
        assert load(tmp_path, content)[0].text == "a b"
    found = load(tmp_path, b"\xef\xbb\xbf [" + row + b", " + row + b"\n,\n" + row + b"]\n", name="p.json")
    assert [found[i].id.rpartition("/")[2] for i in range(3)] == ["p.json:1", "p.json:1.2", "p.json:3"]
    for broken, why in (
        (b"[" + row + row + b"]", "No comma, or one too many"),
        (b"[," + row + b"]", "No comma, or one too many"),
        (b"[" + row + b"]\n[" + row + b"]", "text after the array"),
        (b"[" + row, "not valid JSON"),
        (b"[\n1]", "want one JSON object a row"),
        (b"[\n\n\xff]", "p.json:3: not UTF-8"),
    ):
        assert why in said(tmp_path, broken, name="p.json")


def test_ids_are_compared_as_texts(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "answer": "1", "id": x} for x in (1, 1.0)]
    assert "p.jsonl:2: id '1' was used before" in said(tmp_path, *rows)
