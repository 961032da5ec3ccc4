"""Programming problems as published: their tests, and what belongs to the problem's text beside it."""

from __future__ import annotations

from typing import Any

from stare_megatron.data.json_text import decode_line
from stare_megatron.data.rows import shown

INSTRUCTION = "Write a Python program that solves this. Put the whole of it in one fenced block at the end."


def cases(fields: dict[str, Any], key: str) -> Any:
    """Inputs and outputs, or a list of cases, as JSON or as JSON in a string.

    Raises:
        ValueError: of another form, or none.
    """
    value = fields.get(key)
    if isinstance(value, str):
        try:
            value = decode_line(value)
        except ValueError as e:
            raise ValueError(f"want JSON in a string, got {shown(value)}: {e}") from e
    if isinstance(value, dict) and isinstance(value.get("inputs"), list) and isinstance(value.get("outputs"), list):
        if not value["inputs"]:
            raise ValueError("no tests")
        return {k: value[k] for k in ("fn_name", "inputs", "outputs") if value.get(k)}
    if isinstance(value, list) and value and all(isinstance(case, dict) and "input" in case for case in value):
        return value
    raise ValueError(f"want inputs and outputs, or a list of cases, got {shown(value)}")


def asserts(fields: dict[str, Any], key: str) -> Any:
    """MBPP: a list of asserts; what they need stands in `test_setup_code`, or in the list `test_imports`."""
    value = fields.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(line, str) for line in value):
        raise ValueError(f"want a list of asserts, got {shown(value)}")
    setup = fields.get("test_setup_code") or "\n".join(fields.get("test_imports") or ())
    return {"asserts": value} | ({"setup": str(setup)} if setup else {})


def check_function(fields: dict[str, Any], key: str) -> Any:
    """HumanEval: a function `check`, called with the one named by `entry_point`."""
    value, name = fields.get(key), fields.get("entry_point")
    if not isinstance(value, str) or "def check(" not in value or not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"want a function `check` and an entry_point, got {shown(value)} and {shown(name)}")
    return {"asserts": [f"check({name})"], "setup": value}


def with_starter(fields: dict[str, Any]) -> str:
    """What comes after the problem: the code to begin with, where there is any."""
    starter = fields.get("starter_code")
    return (
        f"\n\nBegin with:\n```python\n{starter.rstrip()}\n```" if isinstance(starter, str) and starter.strip() else ""
    )


def with_asserts(fields: dict[str, Any]) -> str:
    """What comes after the problem: the asserts, which name the function."""
    return "\n\nThe code must pass:\n```python\n" + "\n".join(map(str, fields.get("test_list") or ())) + "\n```"
