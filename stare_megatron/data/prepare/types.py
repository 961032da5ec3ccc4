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


@dataclass(frozen=True)
class Unsuitable:
    """A row in order that has no answer to check: where, why, and its problem."""

    place: str
    reason: str
    problem: str


class MalformedField(Exception):
    """A field that cannot be used; becomes a `Malformed` with its row's place."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field
        self.problem = problem


@dataclass(frozen=True)
class Problem:
    """A problem and its reference answer, cleaned. Several `answers` are alternatives, each of them right.

    `published_id`: the data set's own name for it, empty without one. `tests`: of a programming problem, which has no
    answer but theirs (its `answers` are their hash), as JSON; empty for others.
    """

    place: str
    text: str
    answers: tuple[str, ...]
    published_id: str
    tests: str = ""


# Reads the answers out of a field's value; raises ValueError saying what is wrong.
ReadAnswers = Callable[[Any], tuple[str, ...]]
# Reads the tests out of a row, by the column that they stand in; raises likewise.
ReadTests = Callable[[dict[str, Any], str], Any]


def nothing_more(fields: dict[str, Any]) -> str:
    """Of a problem whose text is all of it."""
    return ""


@dataclass(frozen=True)
class FileLayout:
    """Where a published file keeps things; dotted keys lead into nested objects. `id` is empty if it has none.

    `tests`: the column `answer` holds tests, which it reads in place of `read`. `more`: what belongs after the problem.
    """

    problem: str
    answer: str
    read: ReadAnswers
    id: str = ""
    tests: ReadTests | None = None
    more: Callable[[dict[str, Any]], str] = nothing_more


def suits(fields: dict[str, Any]) -> str:
    """Of a data set whose rows all have an answer."""
    return ""


@dataclass(frozen=True)
class Recipe:
    """A published data set.

    `hub`: its repository; `patterns`: its files there, the first that matches any counts (`{split}` is replaced);
    `layouts`: the forms it is published in, here and by others, the first whose columns a file has counts.
    `check`: the answer after a further demand on it, as `ReadAnswers` raises; `str`: none. `role`: of its rows.
    `unsuitable`: why a row is left out, "" for one that is not: proofs, problems without a known answer.
    """

    name: str
    hub: str
    patterns: tuple[str, ...]
    layouts: tuple[FileLayout, ...]
    split: str = "train"
    role: Literal["train", "eval"] = "train"
    check: Callable[[str], str] = str
    unsuitable: Callable[[dict[str, Any]], str] = suits


@dataclass(frozen=True)
class Counts:
    """Rows per step: `rows` = `malformed` + `unsuitable` + `repeated` + `conflicting` + `same` + `overlapping` +
    `written`.

    `unsuitable`: without an answer to check. `repeated`: a problem again, with the same answer. `conflicting`: one of a
    problem's rows whose answers differ. `same`, `overlapping`: equal to, or with a large share of, a problem of
    `--against`.
    """

    rows: int
    malformed: int
    unsuitable: int
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
