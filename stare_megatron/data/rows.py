"""Rows of data: read from JSON lines, one JSON array or parquet, and what their values mean as text.

A row that cannot be read is `Broken`, not an end.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from stare_megatron.data.json_text import decode, decode_line
from stare_megatron.data.tokenizer import first_line
from stare_megatron.errors import UserError
from stare_megatron.host.files import disguise

SUFFIXES = (".jsonl", ".json", ".parquet")
ABSENT = object()  # no such key; a value may be None
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"})  # control, format, lone surrogates, white space
_SHOWN = 200  # characters of a broken row that are kept
_BATCH = 1024  # rows of parquet in memory at a time
_BETWEEN = re.compile(r"\s*(,?)\s*")  # two items of an array
_BOM = b"\xef\xbb\xbf"
# A list of messages that somebody wrote as a string, as JSON or as Python shows it.
_MESSAGES = re.compile(r"\s*\[\s*\{\s*[\"'](?:role|content|from|value)[\"']\s*:")


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read: what is wrong, and how it begins."""

    problem: str
    begins: str


Row = dict[str, Any] | Broken


def fault(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Why a file holds no rows, and the cure; "" where its name and first bytes say nothing against it."""
    if path.suffix not in suffixes:
        cure = "; convert it" if path.exists() else ", and there is none of this name"
        return f"want a file that ends in {', '.join(suffixes)}{cure}"
    try:
        what, size = disguise(path), path.stat().st_size
    except OSError as e:
        return f"cannot read it: {e.strerror}; give the path of an existing file"
    return what or ("" if size else "the file is empty; it needs at least one row")


def read(path: Path, *, numbered: bool = False) -> Iterator[tuple[str, Row]]:
    """Rows with their place, from 1: the line of JSON (and `LINE.N` for the N-th item on it), the row of parquet.

    `numbered`: a list of objects is a row too, with the keys `0`, `1`, ..., as data sets' viewers call them.

    Raises:
        UserError: the file is missing, of another kind, or broken as a whole.
    """
    if why := fault(path):
        raise UserError(f"{path}: {why}")
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            found = _array(path) if _begins_with_bracket(path) else _lines(path)
            for place, value in found:
                yield place, _object(value, numbered)
    except OSError as e:
        raise UserError(f"{path}: cannot read it: {e.strerror or e}") from e


def _begins_with_bracket(path: Path) -> bool:
    with path.open("rb") as lines:
        return next((x.startswith(b"[") for line in lines if (x := line.removeprefix(_BOM).strip())), False)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            text = raw.removeprefix(_BOM).strip()
            if text:
                try:
                    yield str(number), decode_line(text.decode())
                except UnicodeDecodeError as e:
                    yield str(number), Broken(f"not UTF-8: {e}", repr(text[:_SHOWN]))
                except ValueError as e:
                    begins = text[:_SHOWN].decode(errors="replace")
                    yield str(number), Broken(f"not valid JSON: {e}; one object a line", begins)


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of one JSON array, each with the line it begins on.

    Raises:
        UserError: broken JSON: where the next item would begin cannot be known.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8: {e}") from e
    at, line, counted, first = text.index("[") + 1, 1, 0, True
    before, here = 0, 1  # line of the item before this, and which one on its line this is
    while True:
        between = _BETWEEN.match(text, at)
        assert between is not None  # it matches anything
        at = between.end()
        line += text.count("\n", counted, at)
        counted = at
        if text.startswith("]", at):
            if text[at + 1 :].strip():
                raise UserError(f"{path}:{line}: not valid JSON: text after the array")
            return
        try:
            if bool(between[1]) is first:
                raise json.JSONDecodeError("No comma, or one too many", text, at)
            value, at = decode(text, at)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg} (column {e.colno})") from e
        except ValueError as e:
            raise UserError(f"{path}:{line}: not valid JSON: {e}") from e
        here = here + 1 if line == before else 1
        yield f"{line}.{here}" if here > 1 else str(line), value
        before, first = line, False


def _object(value: Any, numbered: bool) -> Row:
    if numbered and isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(index): item for index, item in enumerate(value)}
    if isinstance(value, dict | Broken):
        return value
    return Broken(f"want one JSON object a row, got {shown(value)}", shown(value))


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{path}: two columns are called {twice!r:.60}")
            for batch in file.iter_batches(_BATCH):
                try:
                    rows: list[Row] = batch.to_pylist()
                except (ValueError, OverflowError):  # bytes that are no UTF-8 text, a date beyond the year 9999
                    rows = [_one_by_one(batch, i) for i in range(batch.num_rows)]
                for row in rows:
                    number += 1
                    yield str(number), row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:  # the last: names of columns
        raise UserError(f"{path}: not a readable parquet file: {first_line(e)}") from e


def _one_by_one(batch: Any, row: int) -> Row:
    found = {}
    for name in batch.schema.names:
        try:
            found[name] = batch.column(name)[row].as_py()
        except (ValueError, OverflowError) as e:
            return Broken(f"key {name!r}: a value that cannot be read: {first_line(e)}", shown(found))
    return found


def find(row: dict[str, Any], key: str) -> Any:
    """The value of a column; a dotted key may also lead into nested objects (`reward_model.ground_truth`). `ABSENT`
    if there is none."""
    if key in row:
        return row[key]
    node: Any = row
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return ABSENT
        node = node[part]
    return node


def text_of(value: Any) -> str:
    """A string as it is, a number in plain digits: 5.0 is 5, 1e17 is 100000000000000000, 0.1 is 0.1.

    Raises:
        ValueError: anything else, a number that is not finite, or a text of nothing but white space.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"want a string or a number, got {shown(value)}")
    if isinstance(value, str):
        if is_blank(value):
            raise ValueError(f"empty or blank: {value!r:.60}")
        return value
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"want a finite number of at most 4,000 digits, got {value}")
    digits = format(value if isinstance(value, Decimal) else Decimal(repr(value)), "f")
    if "." in digits:
        digits = digits.rstrip("0").removesuffix(".")
    return "0" if digits == "-0" else digits


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen."""
    return all(unicodedata.category(c) in _UNSEEN for c in text)


def is_written_messages(text: str) -> bool:
    """Whether a text is a list of chat messages, written as a string."""
    return bool(_MESSAGES.match(text))


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60


def shown(value: Any) -> str:
    """The beginning of a value for a message, however deep and long it is."""
    return _Short().repr(value)[:60]
