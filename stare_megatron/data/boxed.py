"""Answers in boxes: `\\boxed{...}` as models are asked to write them and as published solutions hold them."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d-])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"-?\d+(?:\.\d+)?")  # `\boxed 5`, which some published solutions have


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}` or `\\fbox{...}`, stripped; None if there is none.

    Braces must match, escaped ones (`\\{`) aside. Of nested boxes the innermost counts. A bare number after the
    command is its content.
    """
    closing = _closing(text)
    for match in reversed(list(_BOX.finditer(text))):
        begin = match.end()
        if text[begin] != "{":
            bare = _BARE.match(text, begin)
            if bare:
                return bare[0]
        elif begin in closing:
            return text[begin + 1 : closing[begin]].strip()
    return None


def _closing(text: str) -> dict[int, int]:
    """Index of the closing brace by that of its opening one, in one pass over the text."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing
