"""`metrics.jsonl`: one JSON object a step, flushed; the record the plots and summaries read."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.host.files import named, write_at, write_atomic
from stare_megatron.metrics.catalogue import Metric, by_name

FILE = "metrics.jsonl"

Row = dict[str, float]


class JsonlSink:
    """Appends `{"step": n, name: value, ...}`. A resumed run first cuts, atomically, what lies beyond its checkpoint.

    Raises:
        UserError: an existing file is damaged before its last line.
    """

    def __init__(self, path: Path, restored_step: int) -> None:
        self._path = path
        if path.exists():
            cut(path, restored_step)
        # Without a buffer a whole line is written at once, and a full disk is an error here.
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._newest = self._file.seek(0, os.SEEK_END)  # where the newest line begins
        self._line = b""
        self._row: dict[str, float | str] = {}

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        self._newest, self._line = self._file.seek(0, os.SEEK_END), b""
        self._row = row(step, metrics)
        self._write()

    def amend(self, metrics: Sequence[Metric]) -> None:
        """Replace values of the newest step, in place: the line is written again in one piece, at least as long as it
        was, so that a process that is killed meanwhile leaves the old line or the new one."""
        self._row |= {name: to_json(value) for name, value in by_name(metrics).items()}
        self._write()

    def _write(self) -> None:
        """The row, or what was there, where the disk has no room for it."""
        line = f"{json.dumps(self._row, allow_nan=False):<{max(len(self._line) - 1, 0)}}\n".encode()
        with named(self._path):
            write_at(self._file, self._newest, line, self._line)
        self._line = line

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: those steps come again."""
        self._file.close()
        cut(self._path, step)
        self._file = self._path.open("r+b", buffering=0)
        self._newest, self._line = self._file.seek(0, os.SEEK_END), b""

    def close(self) -> None:
        self._file.close()


def row(step: int, metrics: Sequence[Metric]) -> dict[str, float | str]:
    """One step as JSON has it."""
    return {"step": step} | {name: to_json(value) for name, value in by_name(metrics).items()}


def line(step: int, metrics: Sequence[Metric]) -> str:
    """One step as a line of the file, without its end."""
    return json.dumps(row(step, metrics), allow_nan=False)


@dataclass(frozen=True)
class Record:
    """A metrics file. `torn`: its last line was cut off in writing and is left out of `rows`."""

    rows: list[Row]
    torn: bool


def read(path: Path) -> list[Row]:
    """All steps of a metrics file, in order; each row has the key `step`. A torn last line is left out.

    Raises:
        UserError: unreadable file, or a damaged line that is not the last.
    """
    return read_record(path).rows


def read_steps(path: Path) -> list[Row]:
    """As `read`, of a run that has logged a step.

    Raises:
        UserError: unreadable file, a damaged line that is not the last, or no step in it.
    """
    rows = read(path)
    if not rows:
        raise UserError(f"{path}: no step was logged yet")
    return rows


def read_record(path: Path) -> Record:
    """As `read`, also of a file packed with gzip (`.gz`), and says whether the last line was torn.

    Raises:
        UserError: unreadable file, or a damaged line that is not the last; names file, line and key.
    """
    lines = _text(path).splitlines()
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line))
        except (ValueError, OverflowError, RecursionError) as e:
            if number == len(lines):
                return Record(rows, torn=True)
            raise UserError(f"{path}:{number}: not a line of metrics: {e}; remove the line") from e
    return Record(rows, torn=False)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except gzip.BadGzipFile as e:
        raise UserError(f"{path}: not a gzip file ({e}); pack the metrics again") from e
    except OSError as e:
        raise UserError(f"{path}: cannot read metrics: {e.strerror}; is {path.parent} the folder of a run?") from e
    except (EOFError, zlib.error) as e:
        raise UserError(f"{path}: the gzip file is cut off or damaged ({e}); pack the metrics again") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not text: byte {e.start} is not UTF-8; is it a metrics file?") from e


def _row(line: str) -> Row:
    """Raises:
    ValueError, OverflowError, RecursionError: what is wrong with the line."""
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    row: Row = {}
    for name, value in found.items():
        try:
            row[name] = float(value)
        except (TypeError, ValueError) as e:
            raise ValueError(f"key {name!r}: {value!r} is not a number") from e
    if "step" not in row:
        raise ValueError("no key 'step'")
    row["step"] = float(int(row["step"]))
    return row


def to_json(value: float) -> float | str:
    """A number as JSON. JSON has no non-finite numbers; these strings are what `float()` reads back."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def cut(path: Path, restored_step: int) -> None:
    """Keep the lines of steps up to `restored_step`, byte for byte; the file is replaced whole."""
    kept = [row["step"] <= restored_step for row in read(path)]
    lines = path.read_text().splitlines(keepends=True)
    text = "".join(line.rstrip("\n") + "\n" for line, keep in zip(lines, kept, strict=False) if keep)
    write_atomic(path, text)
