"""What the steps of a preparation hand to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RawRow:
    """A row as published and where it is: `place` is `FILE:LINE` for text, `FILE:row N` for parquet (from 1)."""

    place: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Malformed:
    """A row that cannot be used: where, which field (empty: the row itself), and why."""

    place: str
    field: str
    problem: str
    row: str

    def line(self) -> str:
        field = f"field {self.field!r}: " if self.field else ""
        return f"{self.place}: {field}{self.problem}"


class MalformedField(Exception):
    """A field that cannot be used; becomes a `Malformed` with its row's place."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field
        self.problem = problem


@dataclass(frozen=True)
class Problem:
    """A problem and its reference answer, cleaned. Several `answers` are alternatives, each of them right.

    `published_id`: the data set's own name for it, empty without one.
    """

    place: str
    text: str
    answers: tuple[str, ...]
    published_id: str


# Reads the answers out of a field's value; raises ValueError saying what is wrong.
ReadAnswers = Callable[[Any], tuple[str, ...]]


@dataclass(frozen=True)
class FileLayout:
    """Where a published file keeps things; dotted keys lead into nested objects. `id` is empty if it has none."""

    problem: str
    answer: str
    read: ReadAnswers
    id: str = ""


@dataclass(frozen=True)
class Recipe:
    """A published data set.

    `hub`: its repository; `patterns`: its files there, the first that matches any counts (`{split}` is replaced);
    `layouts`: the forms it is published in, here and by others, the first whose columns a file has counts.
    `check`: the answer after a further demand on it, as `ReadAnswers` raises; `str`: none. `role`: of its rows.
    """

    name: str
    hub: str
    patterns: tuple[str, ...]
    layouts: tuple[FileLayout, ...]
    split: str = "train"
    role: Literal["train", "eval"] = "train"
    check: Callable[[str], str] = str


@dataclass(frozen=True)
class Counts:
    """Rows per step: `rows` = `malformed` + `repeated` + `conflicting` + `same` + `overlapping` + `written`.

    `repeated`: a problem again, with the same answer. `conflicting`: one of a problem's rows whose answers differ.
    `same`, `overlapping`: equal to, or with a large share of, a problem of `--against`.
    """

    rows: int
    malformed: int
    repeated: int
    conflicting: int
    same: int
    overlapping: int
    written: int


@dataclass(frozen=True)
class Removed:
    """A problem that was left out, as `OUT.removed.jsonl` lists it; `id` names it as if it had been kept."""

    id: str
    place: str
    reason: str
    problem: str
