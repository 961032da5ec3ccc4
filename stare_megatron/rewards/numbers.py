"""Numbers as exact fractions, read from an answer in its one spelling (`math_text.py`) without any algebra."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})"
    rf"|(?P<whole>\d+)?\s*\\frac\s*(?:\{{\s*(?P<ftop>-?{_DECIMAL})\s*\}}|(?P<dtop>\d))\s*"
    rf"(?:\{{\s*(?P<fbottom>-?{_DECIMAL})\s*\}}|(?P<dbottom>\d))"
    rf"|(?P<plain>{_DECIMAL})\s*(?:\\(?:times|cdot)\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,4}})\s*\}}?)?)"
)
# Two decimals are equal to so many places after the point, and to this share of the larger: 0.083333 is 1/12.
_PLACES = 6
_RELATIVE = Fraction(1, 10**5)


@dataclass(frozen=True)
class Number:
    """`decimal`: whether it was written with a point, so that it may be rounded."""

    value: Fraction
    decimal: bool


def number(text: str) -> Number | None:
    """The number that a text is; None if it is none, or no finite one."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["plain"]:
        value = Fraction(match["plain"]) * Fraction(10) ** int(match["power"] or 0)
        return Number(sign * value, "." in match["plain"])
    top = match["top"] or match["ftop"] or match["dtop"]
    bottom = match["bottom"] or match["fbottom"] or match["dbottom"]
    if not Fraction(bottom):
        return None
    value = Fraction(match["whole"] or 0) + Fraction(top) / Fraction(bottom)
    return Number(sign * value, "." in top + bottom)


def equal(one: Number, other: Number) -> bool:
    """Exactly, or to six places and a relative 1e-5 where one of them is a decimal."""
    a, b = one.value, other.value
    if a == b:
        return True
    if not (one.decimal or other.decimal) or abs(a - b) > _RELATIVE * max(abs(a), abs(b)):
        return False
    return round(a, _PLACES) == round(b, _PLACES)
