"""Answers in boxes: `\\boxed{...}` as models are asked to write them and as published solutions hold them."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d-])")
_BARE = re.compile(r"-?\d+(?:\.\d+)?")  # `\boxed 5`, which some published solutions have


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}` or `\\fbox{...}`, stripped; None if there is none.

    Braces must match, escaped ones (`\\{`) aside. Of nested boxes the innermost counts. A bare number after the
    command is its content.
    """
    for match in reversed(list(_BOX.finditer(text))):
        begin = match.end()
        if text[begin] != "{":
            bare = _BARE.match(text, begin)
            if bare:
                return bare[0]
            continue
        end = _closing(text, begin)
        if end is not None:
            return text[begin + 1 : end].strip()
    return None


def _closing(text: str, begin: int) -> int | None:
    """Index of the brace that closes the one at `begin`; None if none does."""
    depth, i = 0, begin
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
        i += 1
    return None
