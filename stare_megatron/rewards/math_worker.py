"""A process that compares answers by math-verify: see `workers.py`, `child.py`.

Which text is the answer, its one spelling, and the comparison are three steps (`stated.py`, `math_text.py`, this file).
math-verify's own time-outs are off: they swallow what they interrupt, so that a hang would look like a wrong answer.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from dataclasses import dataclass
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Float

from stare_megatron.data.boxed import last_boxed
from stare_megatron.rewards import child, numbers, stated, units
from stare_megatron.rewards.math_text import Answer, normal
from stare_megatron.tasks.base import UPSTREAM_ERRORS

_TAIL = 4000  # characters in which an answer outside a box is looked for
# Two numbers that math-verify calls equal may differ by this much of the larger: it rounds to six places after the
# point, which is all of a small number. 0.083333 for 1/12 differs by 4e-6.
_RELATIVE = 1e-5
# Beyond these an answer is compared as text: math-verify's parser takes seconds for 20 nested parentheses, and sympy
# for ever for a tower of powers. A reference that is itself longer or deeper allows as much.
_LONGEST, _DEEPEST = 400, 8
_CONTENT = re.compile(r"[A-Za-z0-9]|[^\x00-\x7f]")
_BRACKETS = re.compile(r"\\[{}]|[()\[\]{}]")
_TOWER = re.compile(
    r"(?:\^[\s{(]*(?:\d+|[A-Za-z])[\s)}]*){2,}\^|\d\s*\^\s*\{?\s*\d+\s*\^\s*\{?\s*\d{2,}|\^\s*\{?\s*-?\d{5,}"
)
_MOST = {"^": 12, "|": 8, "/": 12, "%": 1, "\\": 60}  # of a sign
_HUGE = re.compile(
    r"\d{5,}\s*[})]?\s*!|!\s*\)?\s*!|\^\s*\{?\s*\d+\s*\}?\s*\)?\s*!|\d{5,}\s*\^\s*\{?\s*\d{4,}|\\(?:sum|prod|int)(?![A-Za-z])"
)
_APART = re.compile(r"(?<![\w^_.{\\])\d+(?:\.\d+)?\s+\d|\d\.\d+\.\d")  # math-verify adds `1 2`
_BASE = re.compile(r"\(?([0-9A-Za-z]+)\)?_\{?(?:\\text\{)?(\d+|[a-z]+)\}?\}?")
_SPOKEN_BASE = re.compile(r"([0-9A-Fa-f]+) (?:in )?base (\d+)")
_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:([ap])\.?\s*m\b\.?)?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'.-]*(?:[ ,]+[A-Za-z][A-Za-z'.-]*)*")
_WORD = re.compile(r"[A-Za-z]{4,}|[A-Z][a-z]{2,}|\b(?:yes|no|odd|even|one|two)\b", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:the|an?)\s+", re.IGNORECASE)
_MARKS_AN_INTERVAL = re.compile(r"[\[\]]|\\infty|\\cup")


@dataclass(frozen=True)
class Verdict:
    """`graded` is False if the reference cannot be read: that says nothing about the response. `note`: why not."""

    graded: bool
    correct: bool
    note: str


def compare(answer: str, boxed: str | None, tail: str) -> Verdict:
    """Whether a response's answer equals the reference `answer`, or any of several in a JSON list of strings.

    `boxed`: the content of its last box; without one (None), an answer is looked for in `tail`, the end of it.
    """
    verdicts = [_compare(one, boxed, tail) for one in alternatives(answer)]
    return next((v for v in verdicts if v.correct), next((v for v in verdicts if v.graded), verdicts[0]))


def alternatives(reference: str) -> tuple[str, ...]:
    """The answers of a reference: those of a JSON list of strings (`["0.5", "1/2"]`), else the reference itself."""
    if reference.startswith('["') and reference.endswith('"]'):
        try:
            return tuple(map(str, json.loads(reference)))
        except json.JSONDecodeError:
            pass
    return (reference,)


def _compare(answer: str, boxed: str | None, tail: str) -> Verdict:
    letter = stated.is_choice(answer)
    if letter is not None:
        mine = stated.stated_choice(tail) if boxed is None else stated.choice_in(boxed)
        if mine is not None or boxed is None:
            return _verdict(mine == letter, mine or "no one choice", answer)
    gold = normal(answer)
    if not _CONTENT.search(gold.words):
        return Verdict(False, False, f"the reference answer {answer!r:.60} cannot be read")
    said = stated.statement(tail) if boxed is None else stated.within(boxed)
    if said is None or len(said) > max(_LONGEST, 2 * len(answer)):
        return Verdict(True, False, "no answer" if said is None else f"an answer of {len(said)} characters")
    mine = normal(said)
    if not _CONTENT.search(mine.words):
        return Verdict(True, False, "no answer")
    plainly = _plainly(gold, mine)
    if plainly is not None:
        return _verdict(plainly, said, answer)
    if _too_much(mine.text, gold.text):
        return _verdict(False, said, answer)
    return _by_algebra(gold, mine, answer)


def _verdict(correct: bool, found: str, answer: str) -> Verdict:
    return Verdict(True, correct, "" if correct else f"{found!r:.60}, want {answer!r:.60}")


def _plainly(gold: Answer, mine: Answer) -> bool | None:
    """The verdict where none of it is algebra: the same text, words, dates, times, numerals in a base, numbers. None:
    that does not decide."""
    if _folded(gold.words) == _folded(mine.words):
        return True
    if units.differ(gold.unit, mine.unit):
        return False
    for form in (_time, _date, _numeral, _worded):
        one, other = form(gold), form(mine)
        if one is not None or other is not None:
            if form is _numeral and (one is None or other is None):
                continue  # the base may be left out
            return one == other
    one, other = numbers.number(gold.text), numbers.number(mine.text)
    if one is None or other is None:
        return None
    if gold.percent == mine.percent:
        return numbers.equal(one, other)
    share, whole = (one, other) if gold.percent else (other, one)
    return numbers.equal(share, whole) or numbers.equal(numbers.Number(share.value / 100, share.decimal), whole)


def _folded(words: str) -> str:
    return _ARTICLE.sub("", " ".join(words.split())).casefold()


def _time(answer: Answer) -> tuple[int, int, int, str] | None:
    """A time of day: hours, minutes, seconds, "a", "p" or ""."""
    match = _TIME.fullmatch(answer.words.rstrip("."))
    if match is None or not (match[2] or match[4]):
        return None
    return int(match[1]), int(match[2] or 0), int(match[3] or 0), (match[4] or "").lower()


def _date(answer: Answer) -> str | None:
    return answer.words if _DATE.fullmatch(answer.words) else None


def _numeral(answer: Answer) -> tuple[str, str] | None:
    """Digits and base of a number written in a base, as `2516_8`."""
    text = answer.words.replace(" ", "")
    match = _BASE.fullmatch(text) or _SPOKEN_BASE.fullmatch(answer.words)
    if match is None or not match[1][0].isdigit():
        return None
    return match[1].upper().lstrip("0"), match[2]


def _worded(answer: Answer) -> str | None:
    """What is a word or words of a language, not a product of letters."""
    words = answer.words.strip()
    return _folded(words) if "\\" not in answer.text and _WORDS.fullmatch(words) and _WORD.search(words) else None


def _too_much(text: str, reference: str) -> bool:
    """Whether an answer is deeper or higher than math-verify can take in a second or two, or brackets do not match."""
    depth = _depth(text)
    return (
        depth is None
        or depth > max(_DEEPEST, _depth(reference) or 0)
        or len(text) > max(_LONGEST, 2 * len(reference))
        or any(text.count(sign) > max(most, reference.count(sign)) for sign, most in _MOST.items())
        or any(found.search(text) and not found.search(reference) for found in (_TOWER, _HUGE, _APART))
    )


def _depth(text: str) -> int | None:
    """How deep brackets of any kind nest; None if they do not match in number."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket[-1] in "([{" else -1
        deepest = max(deepest, depth)
        if depth < 0:
            return None
    return None if depth else deepest


def _by_algebra(gold: Answer, mine: Answer, answer: str) -> Verdict:
    one, other = (_read(a.text + ("\\%" if a.percent else "")) for a in (gold, mine))
    if not one:
        return Verdict(False, False, f"the reference answer {answer!r:.60} cannot be read")
    if not other:
        return Verdict(True, False, "no answer")
    try:
        correct = _equal(one, other, gold.text)
        if not correct and gold.percent != mine.percent:
            bare = _read(gold.text), _read(mine.text)
            correct = bool(all(bare)) and _equal(*bare, gold.text)
    except UPSTREAM_ERRORS as e:  # sympy, on what a policy wrote
        return Verdict(True, False, f"{mine.words!r:.60}: {type(e).__name__}")
    return _verdict(correct, str(other[-1]), answer)


@functools.lru_cache(256)  # the samples of a prompt share its reference
def _read(text: str) -> list[Any]:
    """As LaTeX or not at all: math-verify would go on and take any fraction from the midst of what it cannot read."""
    whole = f"\\boxed{{{text}}}"
    return parse(whole, (_LATEX,), extraction_mode="first_match", parsing_timeout=None)  # type: ignore[arg-type]


_LATEX = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all"),
)


def _equal(gold: list[Any], found: list[Any], reference: str) -> bool:
    sets = bool(_MARKS_AN_INTERVAL.search(reference))  # a reference with brackets that cannot be a point
    if not verify(gold, found, allow_set_relation_comp=sets, timeout_seconds=None):
        return _complex_equal(gold[0], found[0])
    return _close(gold[0], found[0])


def _complex_equal(gold: Any, found: Any) -> bool:
    """Whether two numbers are one although a letter `i` was left a variable: `e^{i\\pi}`, -1."""
    if not (isinstance(gold, Expr) and isinstance(found, Expr)):
        return False
    names = {str(s) for s in gold.free_symbols | found.free_symbols}
    if not names or names - {"i", "pi"}:
        return False
    values = [(s, sympy.I if str(s) == "i" else sympy.pi) for s in gold.free_symbols | found.free_symbols]
    difference: Any = abs((gold - found).subs(values).doit().evalf(30))
    return bool(difference.is_number and difference.is_comparable and difference < 1e-12)


def _close(gold: Any, found: Any) -> bool:
    """False for two numbers that are not equal: exactly, or within `_RELATIVE` if either is a decimal fraction."""
    if not (isinstance(gold, Expr) and isinstance(found, Expr) and gold.is_number and found.is_number):
        return True
    a, b = gold.doit(), found.doit()
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    difference, size = abs((a - b).evalf(30)), abs(a.evalf(30))
    if not (difference.is_Float or difference.is_Integer) or not size.is_Float:
        return True  # complex or symbolic after all: math-verify's word
    exact = not (a.has(Float) or b.has(Float))
    bound = 1e-15 if exact else _RELATIVE
    return bool(difference <= bound * size)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One request of `math_answer.py`."""
    text = request["response"]
    boxed = last_boxed(text)
    if boxed == "":
        return {"graded": True, "correct": False, "note": "empty \\boxed{}"}
    verdict = compare(request["answer"], boxed, text[-_TAIL:])
    return {"graded": verdict.graded, "correct": verdict.correct, "note": verdict.note}


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # an error in the middle of math-verify would look like a wrong answer
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    child.serve(answer)
