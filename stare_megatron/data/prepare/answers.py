"""How data sets write their reference answers."""

from __future__ import annotations

import json
import re
from typing import Any

from stare_megatron.data.boxed import last_boxed

_DOLLAR = re.compile(r"(?<!\\)\$")


def plain(value: Any) -> tuple[str, ...]:
    """A string or number that is the answer."""
    return (_clean(_text(value)),)


def after_hashes(value: Any) -> tuple[str, ...]:
    """GSM8K: a solution that ends in `#### 1,234`; the answer without the commas."""
    _, mark, answer = _text(value).rpartition("####")
    if not mark:
        raise ValueError("no '####' before the answer")
    return (_clean(answer).replace(",", ""),)


def in_box(value: Any) -> tuple[str, ...]:
    """A solution whose last `\\boxed{...}` is the answer."""
    answer = last_boxed(_text(value))
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
    return [_clean(_text(item)) for item in items]


def json_list(value: Any) -> tuple[str, ...]:
    """Skywork-OR1: a JSON list written as a string; several items are alternatives."""
    try:
        items = json.loads(_text(value))
    except json.JSONDecodeError:
        items = None
    if not isinstance(items, list):
        raise ValueError(f"want a JSON list in a string, got {value!r:.60}")
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


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"want a string or a number, got {value!r:.60}")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _clean(answer: str) -> str:
    answer = _DOLLAR.sub("", answer).strip()
    if not answer:
        raise ValueError("empty")
    return answer
