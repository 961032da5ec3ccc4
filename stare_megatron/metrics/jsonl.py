"""`metrics.jsonl`: one JSON object a step, flushed; the record the plots and summaries read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.metrics.catalogue import Metric, by_name

FILE = "metrics.jsonl"

Row = dict[str, float]


class JsonlSink:
    """Appends `{"step": n, name: value, ...}`. A resumed run first cuts, atomically, what lies beyond its checkpoint.

    Raises:
        UserError: an existing file is damaged before its last line.
    """

    def __init__(self, path: Path, restored_step: int) -> None:
        if path.exists():
            cut(path, restored_step)
        self._file = path.open("a")

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        self._file.write(line(step, metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def line(step: int, metrics: Sequence[Metric]) -> str:
    """One step as a line of the file."""
    row = {"step": step} | {name: to_json(value) for name, value in by_name(metrics).items()}
    return json.dumps(row, allow_nan=False) + "\n"


def read(path: Path) -> list[Row]:
    """All steps of a metrics file, in order; each row has the key `step`. A torn last line is left out.

    Raises:
        UserError: unreadable file, or a damaged line that is not the last.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as e:
        raise UserError(f"{path}: cannot read metrics: {e.strerror}; is {path.parent} the folder of a run?") from e
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = {str(name): float(value) for name, value in json.loads(line).items()}
            row["step"] = float(int(row["step"]))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a line of metrics ({type(e).__name__}); remove the line") from e
        rows.append(row)
    return rows


def to_json(value: float) -> float | str:
    """A number as JSON. JSON has no non-finite numbers; these strings are what `float()` reads back."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def cut(path: Path, restored_step: int) -> None:
    """Keep the lines of steps up to `restored_step`, byte for byte; the file is replaced whole."""
    kept = [row["step"] <= restored_step for row in read(path)]
    lines = path.read_text().splitlines(keepends=True)
    text = "".join(line for line, keep in zip(lines, kept, strict=False) if keep)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
