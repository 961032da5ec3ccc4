"""Rows of published files with their places. A row that cannot be read is a `Malformed`, not an end."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from stare_megatron.data import rows
from stare_megatron.data.prepare.types import Malformed, RawRow
from stare_megatron.errors import UserError

SUFFIXES = (*rows.SUFFIXES, ".csv")
_MOST = 2**31 - 1  # characters of a cell; the csv module stops at 131,072


def read(path: Path) -> Iterator[RawRow | Malformed]:
    """The rows of a file, one at a time where its format allows: JSON lines, one JSON array, parquet or CSV.

    Raises:
        UserError: the file is missing, of another kind, or broken as a whole.
    """
    if path.suffix not in rows.SUFFIXES:  # `rows.read` looks at those itself
        if why := rows.fault(path, SUFFIXES):
            raise UserError(f"{path}: {why}")
        yield from _csv(path)
        return
    kind = "row " if path.suffix == ".parquet" else ""
    for at, row in rows.read(path, numbered=True):
        place = f"{path}:{kind}{at}"
        yield Malformed(place, "", row.problem, row.begins) if isinstance(row, rows.Broken) else RawRow(place, row)


def _csv(path: Path) -> Iterator[RawRow | Malformed]:
    """Rows under a line of column names, each with the line it ends on."""
    csv.field_size_limit(_MOST)
    lines = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            names = list(table.fieldnames or ())
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{path}:1: two columns are called {twice!r:.60}")
            for row in table:
                lines = table.line_num
                if None in row or None in row.values():
                    yield Malformed(f"{path}:{lines}", "", f"want {len(names)} columns", rows.shown([*row.values()]))
                else:
                    yield RawRow(f"{path}:{lines}", dict(row))
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8: {e}") from e
    except OSError as e:
        raise UserError(f"{path}: cannot read it: {e.strerror or e}") from e
    except csv.Error as e:
        raise UserError(f"{path}:{lines + 1}: not readable as CSV from here on: {e}") from e
