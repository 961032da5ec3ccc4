"""Rows of published files with their places. A row that cannot be read is a `Malformed`, not an end."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from stare_megatron.data import parquet
from stare_megatron.data.json_text import decode, decode_line
from stare_megatron.data.prepare.types import Malformed, RawRow
from stare_megatron.errors import UserError

_SHOWN = 200  # characters of a malformed row that are kept
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def read(path: Path) -> Iterator[RawRow | Malformed]:
    """The rows of a file, one at a time where its format allows: JSON lines, one JSON array, parquet or CSV.

    Raises:
        UserError: the file is missing, of another kind, or broken as a whole.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: want a file that ends in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            yield from (RawRow(f"{path}:row {number}", row) for number, row in parquet.read(path))
        elif path.suffix == ".csv":
            yield from _csv(path)
        elif _first_character(path) == "[":
            yield from _array(path, path.read_text(encoding="utf-8-sig"))
        else:
            yield from _lines(path)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8: {e}") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from e
    except csv.Error as e:
        raise UserError(f"{path}: not readable as CSV: {e}") from e


def _first_character(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                return line.strip()[0]
    return ""


def _lines(path: Path) -> Iterator[RawRow | Malformed]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = decode_line(line)
            except ValueError as e:
                yield Malformed(f"{path}:{number}", "", f"not valid JSON: {e}", line.strip()[:_SHOWN])
            else:
                yield _row(f"{path}:{number}", value)


def _array(path: Path, text: str) -> Iterator[RawRow | Malformed]:
    """The items of one JSON array, each with the line it begins on.

    Raises:
        UserError: broken JSON: where the next item would begin cannot be known.
    """
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while text[position : position + 1].isspace() or text[position : position + 1] == ",":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decode(text, position)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg} (column {e.colno})") from e
        except ValueError as e:
            raise UserError(f"{path}:{line}: not valid JSON: {e}") from e
        yield _row(f"{path}:{line}", value)


def _row(place: str, value: object) -> RawRow | Malformed:
    if not isinstance(value, dict):
        return Malformed(place, "", f"want an object, got {value!r:.60}", json.dumps(value)[:_SHOWN])
    return RawRow(place, value)


def _csv(path: Path) -> Iterator[RawRow | Malformed]:
    """Rows under a line of column names, each with the line it ends on."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                problem = f"want {len(rows.fieldnames or ())} columns"
                yield Malformed(place, "", problem, json.dumps(list(row.values()), default=str)[:_SHOWN])
            else:
                yield RawRow(place, dict(row))
