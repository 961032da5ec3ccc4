"""A process that compares answers by math-verify: see `workers.py`, `child.py`.

math-verify's own time-outs are off: they swallow what they interrupt, so that a hang would look like a wrong answer.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Expr, Float

from stare_megatron.rewards import child, math_text

# Two numbers that math-verify calls equal may differ by this much of the larger: it rounds to six places after the
# point, which is all of a small number. 0.083333 for 1/12 differs by 4e-6.
_RELATIVE = 1e-5


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
    verdicts = [_compare(one, boxed, tail) for one in math_text.alternatives(answer)]
    return next((v for v in verdicts if v.correct), next((v for v in verdicts if v.graded), verdicts[0]))


def _compare(answer: str, boxed: str | None, tail: str) -> Verdict:
    reference = math_text.tidy(answer)
    letter = math_text.choice(reference)
    if letter is not None:
        mine = math_text.stated_choice(tail) if boxed is None else math_text.chosen(boxed)
        if mine is not None:
            return _verdict(mine == letter, mine, answer)
    response = tail if boxed is None else math_text.tidy(boxed)
    numeral, other = math_text.numeral(reference), math_text.numeral(response)
    if numeral and other:
        return _verdict(numeral == other, response, answer)
    units = not math_text.ends_in_a_letter(reference)
    gold = _read_box(reference, units)
    if not gold:
        return Verdict(False, False, f"the reference answer {answer!r:.60} cannot be read")
    found = _read_text(response, units) if boxed is None else _read_box(response, units)
    if not found:
        return Verdict(True, False, "no answer")
    correct = _equal(gold, found, reference) or _equal_percent(reference, response, boxed is not None, units)
    return _verdict(correct, str(found[-1]), answer)


def _verdict(correct: bool, found: str, answer: str) -> Verdict:
    return Verdict(True, correct, "" if correct else f"{found!r:.60}, want {answer!r:.60}")


def _read_box(text: str, units: bool) -> list[Any]:
    """As LaTeX or not at all: math-verify would go on and take any number from the midst of what it cannot read."""
    return parse(f"\\boxed{{{text}}}", (_latex(units),), parsing_timeout=None)  # type: ignore[arg-type]


def _read_text(text: str, units: bool) -> list[Any]:
    return parse(text, (_latex(units), ExprExtractionConfig()), parsing_timeout=None)  # type: ignore[arg-type]


def _latex(units: bool) -> LatexExtractionConfig:
    normal = NormalizationConfig(units=units, malformed_operators=True, nits=True, boxed="all")
    return LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)


def _equal(gold: list[Any], found: list[Any], reference: str) -> bool:
    sets = math_text.is_surely_a_set(reference)
    if not verify(gold, found, allow_set_relation_comp=sets, timeout_seconds=None):
        return False
    return _close(gold[0], found[0])


def _close(gold: Any, found: Any) -> bool:
    """False for two numbers that are not equal: exactly, or within `_RELATIVE` if either is a decimal fraction."""
    if not (isinstance(gold, Expr) and isinstance(found, Expr) and gold.is_number and found.is_number):
        return True
    a, b = gold.doit(), found.doit()
    if a.is_Rational and b.is_Rational:
        return bool(a == b) or _is_percent_of(a, b)
    difference, size = abs((a - b).evalf(30)), abs(a.evalf(30))
    if not (difference.is_Float or difference.is_Integer) or not size.is_Float:
        return True  # complex or symbolic after all: math-verify's word
    exact = not (a.has(Float) or b.has(Float))
    bound = 1e-15 if exact else _RELATIVE
    return bool(difference <= bound * size) or _is_percent_of(a, b)


def _is_percent_of(a: Any, b: Any) -> bool:
    """math-verify lets 50 % stand for 50 as for 0.5; both read as 1/2 here."""
    return bool(a * 100 == b) or bool(b * 100 == a)


def _equal_percent(reference: str, response: str, boxed: bool, units: bool) -> bool:
    """A percent sign that only one of the two has: 12.5 for 12.5 %."""
    bare, mine = math_text.without_percent(reference), math_text.without_percent(response)
    if not boxed or (bare == reference) == (mine == response):
        return False
    gold, found = _read_box(bare, units), _read_box(mine, units)
    return bool(gold and found) and _equal(gold, found, reference)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One request of `math_answer.py`."""
    verdict = compare(request["answer"], request["boxed"], request["tail"])
    return {"graded": verdict.graded, "correct": verdict.correct, "note": verdict.note}


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # an error in the middle of math-verify would look like a wrong answer
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    child.serve(answer)
