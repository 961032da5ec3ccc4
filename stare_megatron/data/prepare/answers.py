"""How data sets write their reference answers."""

from __future__ import annotations

import re
from typing import Any

from stare_megatron.data.boxed import last_boxed
from stare_megatron.data.json_text import decode_line
from stare_megatron.data.rows import is_blank, shown, text_of

_DOLLAR = re.compile(r"(?<!\\)\$")


def plain(value: Any) -> tuple[str, ...]:
    """A string or number that is the answer."""
    return (_clean(text_of(value)),)


def after_hashes(value: Any) -> tuple[str, ...]:
    """GSM8K: a solution that ends in `#### 1,234`; the answer without the commas."""
    _, mark, answer = text_of(value).rpartition("####")
    if not mark:
        raise ValueError("no '####' before the answer")
    return (_clean(answer).replace(",", ""),)


def in_box(value: Any) -> tuple[str, ...]:
    """A solution whose last `\\boxed{...}` is the answer."""
    answer = last_boxed(text_of(value))
    if answer is None:
        raise ValueError("no \\boxed{...} with matching braces")
    return (_clean(answer),)


def alternatives(value: Any) -> tuple[str, ...]:
    """A list of answers each of which is right, or one answer."""
    return tuple(dict.fromkeys(_items(value)))


def all_of(value: Any) -> tuple[str, ...]:
    """A list of answers that together are the answer."""
    return (", ".join(_items(value)),)


def _items(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("an empty list")
    return [_clean(text_of(item)) for item in items]


def json_list(value: Any) -> tuple[str, ...]:
    """Skywork-OR1: a JSON list written as a string; several items are alternatives."""
    try:
        items = decode_line(text_of(value))
    except ValueError:
        items = None
    if not isinstance(items, list):
        raise ValueError(f"want a JSON list in a string, got {shown(value)}")
    return alternatives(items)


def aime(answer: str) -> str:
    """An integer from 0 to 999, without leading zeros."""
    if not re.fullmatch(r"\d+", answer) or int(answer) > 999:
        raise ValueError(f"want an integer from 0 to 999, got {answer!r:.60}")
    return str(int(answer))


def integer_or_decimal(answer: str) -> str:
    """A plain number, as GSM8K's answers are."""
    if not re.fullmatch(r"-?\d+(?:\.\d+)?", answer):
        raise ValueError(f"want a number, got {answer!r:.60}")
    return answer


def no_answer(fields: dict[str, Any]) -> str:
    """NuminaMath-1.5 and what is made of it: why a row's answer is none to check; "" if it is."""
    if str(fields.get("question_type")).lower() == "proof":
        return "a proof"
    answer = fields.get("answer")
    if answer is None or str(answer).strip().lower() in ("", "proof", "notfound"):
        return f"no answer: {shown(answer)}"
    for key in ("problem_is_valid", "solution_is_valid"):
        if fields.get(key) not in (None, "Yes"):
            return f"{key}: {shown(fields[key])}"
    return ""


def no_box(fields: dict[str, Any]) -> str:
    """NuminaMath-CoT: a solution without a box is a proof, or lost its answer."""
    solution = fields.get("solution")
    return "no box in the solution" if isinstance(solution, str) and last_boxed(solution) is None else ""


def _clean(answer: str) -> str:
    answer = _DOLLAR.sub("", answer).strip()
    if is_blank(answer):
        raise ValueError("empty")
    return answer
