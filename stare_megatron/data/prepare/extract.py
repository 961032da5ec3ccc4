"""A problem and its answers out of a published row."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

from stare_megatron.data import rows
from stare_megatron.data.prepare.read import read
from stare_megatron.data.prepare.types import (
    FileLayout,
    Malformed,
    MalformedField,
    Problem,
    RawRow,
    ReadTests,
    Recipe,
    Unsuitable,
)
from stare_megatron.errors import UserError

# What publishers put around a problem. DAPO-Math-17k: before and after; others append a sentence.
_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem."
)
_DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'
_APPENDED = (
    "Let's think step by step and output the final answer within \\boxed{}.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
)
_SHOWN = 200  # characters of a malformed row that are kept


def problems(recipe: Recipe, path: Any) -> Iterator[Problem | Malformed | Unsuitable]:
    """The problems of one file in its order, with the rows that hold none, or none that is to be had.

    Raises:
        UserError: the file cannot be read, has no row, or its columns are none of the recipe's.
    """
    found = read(path)
    seen: list[RawRow | Malformed] = []
    layout: FileLayout | None = None
    for row in found:
        seen.append(row)
        if isinstance(row, RawRow):
            layout = _layout(recipe, row)
            if layout is not None:
                break
    if layout is None:
        columns = next((list(row.fields) for row in seen if isinstance(row, RawRow)), None)
        if columns is None:
            raise UserError(f"{path}: no rows" if not seen else f"{seen[0].place}: no readable row in this file")
        known = " or ".join(f"{x.problem} and {x.answer}" for x in recipe.layouts)
        raise UserError(
            f"{path}: columns {', '.join(columns)}: {recipe.name} has {known}; choose the data set the file belongs to"
        )
    for row in itertools.chain(seen, found):
        yield row if isinstance(row, Malformed) else _problem(recipe, layout, row)


def _layout(recipe: Recipe, row: RawRow) -> FileLayout | None:
    for layout in recipe.layouts:
        if all(rows.find(row.fields, key) is not rows.ABSENT for key in (layout.problem, layout.answer)):
            return layout
    return None


def _problem(recipe: Recipe, layout: FileLayout, row: RawRow) -> Problem | Malformed | Unsuitable:
    try:
        text = _text(row.fields, layout.problem)
        if reason := recipe.unsuitable(row.fields):
            return Unsuitable(row.place, reason, text)
        published_id = _published_id(row.fields, layout.id)
        if layout.tests is not None:
            tests = _tests(layout, layout.tests, row.fields)
            digest = hashlib.blake2b(tests.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
            return Problem(row.place, text + layout.more(row.fields), (digest,), published_id, tests)
        answers = _answers(recipe, layout, row.fields)
        return Problem(row.place, text, answers, published_id)
    except MalformedField as e:
        return Malformed(row.place, e.field, e.problem, _shown(row.fields))
    except RecursionError:
        return Malformed(row.place, "", "nested too deep", rows.shown(row.fields))


def _shown(fields: dict[str, Any]) -> str:
    try:
        return json.dumps(fields, ensure_ascii=False, default=str)[:_SHOWN]
    except RecursionError:
        return rows.shown(fields)


def _text(fields: dict[str, Any], key: str) -> str:
    value = _present(fields, key)
    if isinstance(value, list):  # chat messages
        users = [m for m in value if isinstance(m, dict) and m.get("role") == "user"]
        if len(value) != 1 or len(users) != 1 or not isinstance(users[0].get("content"), str):
            raise MalformedField(key, f"want one user message with a text, got {rows.shown(value)}")
        value = users[0]["content"]
    if not isinstance(value, str):
        raise MalformedField(key, f"want a string, got {rows.shown(value)}")
    if rows.is_written_messages(value):
        raise MalformedField(key, "messages written as one string; want a problem's text")
    if fields.get("modality") == "Multimodal":
        raise MalformedField("modality", "the problem needs its images")
    text = _unwrapped(value, key)
    if rows.is_blank(text):
        raise MalformedField(key, "empty")
    context = fields.get("context")
    if not isinstance(context, str | None):
        raise MalformedField("context", f"want a string, got {rows.shown(context)}")
    return text if context is None or rows.is_blank(context) else f"{context.strip()}\n\n{text}"


def _unwrapped(text: str, key: str) -> str:
    text = text.strip()
    before, after = text.startswith(_DAPO_BEFORE), text.endswith(_DAPO_AFTER)
    if before != after:
        raise MalformedField(key, f"only one half of the instruction {_DAPO_AFTER!r} around it")
    if before:
        text = text[len(_DAPO_BEFORE) : -len(_DAPO_AFTER)].strip()
    for sentence in _APPENDED:
        text = text.removesuffix(sentence).strip()
    return text


def _answers(recipe: Recipe, layout: FileLayout, fields: dict[str, Any]) -> tuple[str, ...]:
    value = _present(fields, layout.answer)
    try:
        return tuple(recipe.check(answer) for answer in layout.read(value))
    except ValueError as e:
        raise MalformedField(layout.answer, str(e)) from e


def _tests(layout: FileLayout, read_tests: ReadTests, fields: dict[str, Any]) -> str:
    _present(fields, layout.answer)
    try:
        return json.dumps(read_tests(fields, layout.answer))
    except ValueError as e:
        raise MalformedField(layout.answer, str(e)) from e


def _published_id(fields: dict[str, Any], key: str) -> str:
    value = rows.find(fields, key) if key else rows.ABSENT
    if value is rows.ABSENT or value is None or (isinstance(value, str) and rows.is_blank(value)):
        return ""
    try:
        return rows.text_of(value)
    except ValueError as e:
        raise MalformedField(key, str(e)) from e


def _present(fields: dict[str, Any], key: str) -> Any:
    value = rows.find(fields, key)
    if value is rows.ABSENT:
        raise MalformedField(key, f"missing; the row has {', '.join(fields) or 'nothing'}")
    if value is None:
        raise MalformedField(key, "null")
    return value
