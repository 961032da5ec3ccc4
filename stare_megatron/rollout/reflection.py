"""Reflection words: how often a response says `wait`, `however`, `let me check` and the like."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def word_counter(words: Sequence[str]) -> Callable[[str], int]:
    """A function that counts the occurrences of whole words and phrases in a text, in any case.

    White space in a phrase stands for any run of white space. Occurrences do not overlap: of two that begin at one
    place the longer counts.
    """
    phrases = sorted((r"\s+".join(map(re.escape, word.split())) for word in words), key=len, reverse=True)
    if not phrases:
        return lambda text: 0
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)
    return lambda text: sum(1 for _ in pattern.finditer(text))
