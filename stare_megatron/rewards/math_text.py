"""Small rewrites of answers as text, applied to reference and response alike before math-verify reads them.

Each mends one way in which math-verify misreads what people write; docs/rewards.md lists them with examples.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

# What may stand between groups of three digits besides a comma, which math-verify reads by itself.
_SEPARATOR = r"(?:\{,\}|,?\\!|\\[,;: ]|~|[ \u00a0\u2009\u202f])\s*"
_GROUPED = re.compile(rf"(?<![\d.])(\d{{1,3}})((?:{_SEPARATOR}\d{{3}})+)(?!\d)")
_SEPARATORS = re.compile(_SEPARATOR)
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?)(\d+)(?![\w.])")
_CURRENCY = re.compile(r"\\(?:euro|pounds|yen)(?![a-zA-Z])\s*|\\text\{\s*[€£¥₹]\s*\}|[€£¥₹]\s*")
_END = re.compile(r"(?:\\[,;:! ]|[\s.,;]|(?<!\\)~)+$")
_WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|bf|rm)\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(([A-Ja-j])\)|([A-J])")
_CHOSEN = re.compile(r"\(([A-Ja-j])\)(?:[\s.:,]|\\[ ,]|$)|([A-Ja-j])(?:[.):]|$)")
_STATED_CHOICE = re.compile(r"answer(?:\s+is)?\s*:?\s*\**\s*(?:\(([A-J])\)|([A-J])(?![\w'(]))", re.IGNORECASE)
_BASE = re.compile(r"([0-9A-Za-z]+)_\{?(?:\\text\{)?(\d+|[a-z]+)\}?\}?")
_PERCENT = re.compile(r"\s*\\?%$")
_MARKS_AN_INTERVAL = re.compile(r"[\[\]]|\\infty|\\cup")
# One letter at the end: math-verify takes it for a unit and drops it (`3t` becomes 3).
_LETTER_AT_END = re.compile(r"(?:[\d})\s])\s*[tlcmsdgho]\s*$")


def alternatives(reference: str) -> tuple[str, ...]:
    """The answers of a reference: those of a JSON list of strings (`["0.5", "1/2"]`), else the reference itself."""
    if reference.startswith('["') and reference.endswith('"]'):
        try:
            return tuple(map(str, json.loads(reference)))
        except json.JSONDecodeError:
            pass
    return (reference,)


def tidy(text: str) -> str:
    """An answer without separators between groups of three digits, E notation, currency signs and punctuation at
    its end."""
    text = text.replace("\\varnothing", "\\emptyset").replace("\N{MINUS SIGN}", "-").replace("＄", "$")
    text = text.replace("\\$", "").strip()
    if not text.endswith(("\\ldots", "\\dots", "...")):
        text = _END.sub("", text)
    text = _CURRENCY.sub("", text)
    text = _GROUPED.sub(lambda m: m[1] + _SEPARATORS.sub("", m[2]), text)
    return _SCIENTIFIC.sub(lambda m: f"{m[1]} \\times 10^{{{m[2].replace('+', '')}{m[3]}}}", text)


def plain(text: str) -> str:
    """The text without `\\text{...}` and its like around parts of it, dollar signs and outer white space."""
    before = None
    while before != text:
        before, text = text, _WRAPPER.sub(r"\1", text)
    return text.replace("$", "").strip()


def choice(reference: str) -> str | None:
    """The letter (A to J) of a reference that is a multiple-choice letter, bracketed or not; else None."""
    match = _CHOICE.fullmatch(plain(reference))
    return (match[1] or match[2]).upper() if match else None


def chosen(answer: str) -> str | None:
    """The letter that an answer of one's own begins with, as in `\\textbf{(D)}\\ 42`, `D`, `D. 42`; else None."""
    match = _CHOSEN.match(plain(answer))
    return (match[1] or match[2]).upper() if match else None


def stated_choice(text: str) -> str | None:
    """The letter after the last "answer is", "answer:" in running text; None if there is none."""
    found = _STATED_CHOICE.findall(text)
    return (found[-1][0] or found[-1][1]).upper() if found else None


@dataclass(frozen=True)
class Numeral:
    """A number written in a base, as `2516_8`."""

    digits: str
    base: str


def numeral(text: str) -> Numeral | None:
    """The numeral that the text is; None if it is none."""
    match = _BASE.fullmatch(text.replace(" ", ""))
    return Numeral(match[1].upper().lstrip("0"), match[2]) if match and match[1][0].isdigit() else None


def without_percent(text: str) -> str:
    """The text without a percent sign at its end."""
    return _PERCENT.sub("", text)


def is_surely_a_set(reference: str) -> bool:
    """Whether a reference with brackets cannot be a point: half open, infinite or a union."""
    return bool(_MARKS_AN_INTERVAL.search(reference))


def ends_in_a_letter(reference: str) -> bool:
    """Whether the text ends in a lone letter that math-verify would drop as a unit."""
    return bool(_LETTER_AT_END.search(reference))
