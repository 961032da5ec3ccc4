"""Few-shot prompts of reasoning-gym's generated, verifiable tasks, and their verifier.

Upstream: github.com/open-thought/reasoning-gym.

A prompt shows solved questions of the same task and ends in an open one. The reference answer is a JSON object with the
task's name and the whole entry, which is what reasoning-gym's own scorer wants; only its full score counts as right.
"""

from __future__ import annotations

import cmath
import itertools
import json
import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stare_megatron.errors import UserError
from stare_megatron.tasks.base import UPSTREAM_ERRORS, TaskPrompt
from stare_megatron.types import Score

STOP = "\n"
_SPARE = 4  # questions drawn for one that is wanted, at most


def prompts(
    dataset: str, settings: dict[str, Any], count: int, shots: int, seed: int, without: Set[str] = frozenset()
) -> list[TaskPrompt]:
    """`count` prompts, equal for equal arguments; other seeds give other questions.

    Small settings have few questions, and other seeds then many in common: `without` names questions, as `questions`
    gives them, that shall occur in no prompt, neither solved nor open.

    Raises:
        UserError: reasoning-gym is not installed, it has no such data set, the data set refuses its settings, or has
            too few questions besides `without`.
    """
    gym = _gym()
    if count < 1 or shots < 0:
        raise UserError(f"{dataset}: {count} prompts of {shots} shots asked")
    try:
        wanted = count * (shots + 1)
        entries = gym.create_dataset(dataset, seed=seed, size=wanted * (_SPARE if without else 1), **settings)
        allowed = list(itertools.islice((e for e in entries if _key(_line(e)) not in without), wanted))
        if len(allowed) < wanted:
            raise UserError(
                f"{dataset} with {settings}: {len(allowed)} of {wanted} questions are none of those left out"
            )
        made = []
        for index in range(count):
            block = allowed[index * (shots + 1) : (index + 1) * (shots + 1)]
            lines = [f"{_line(e)} {e['answer']}" for e in block[:-1]] + [_line(block[-1])]
            answer = json.dumps({"dataset": dataset, "entry": block[-1]}, default=str)
            made.append(TaskPrompt(f"{dataset}-{seed}-{index:05d}", "\n".join(lines), answer))
    except (ValueError, TypeError, AssertionError) as e:
        raise UserError(f"reasoning-gym data set {dataset!r} with {settings}: {e}") from e
    return made


def questions(prompt: str) -> set[str]:
    """All questions, solved and open, of a prompt that `prompts` made."""
    return {_key(line) for line in prompt.splitlines()}


@dataclass(frozen=True)
class Reference:
    """What a prompt's answer holds: the data set's name, and the entry that its scorer wants."""

    dataset: str
    entry: dict[str, Any]

    @property
    def answer(self) -> str:
        """The right answer, "" where upstream gives none."""
        answer = self.entry["answer"]
        return "" if answer is None else str(answer)


def read(answer: str) -> Reference:
    """The reference in a prompt's answer.

    Raises:
        ValueError: it is none that `prompts` wrote, or upstream has no such data set. UserError: no reasoning-gym.
    """
    wrote = "tools/make_reasoning_prompts.py writes the answers that this reward wants"
    try:
        held = json.loads(answer)
        made = Reference(held["dataset"], held["entry"])
        complete = isinstance(made.entry, dict) and "answer" in made.entry
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ValueError(f"{wrote}, got {answer!r:.60}") from e
    if not complete or made.dataset not in datasets():
        raise ValueError(f"{wrote}: {made.dataset!r:.60} is no data set of reasoning-gym, or its entry has no answer")
    return made


def verify(answer: str, response: str) -> Score:
    """Score the first line of a response. Upstream's scorers evaluate it (`eval`, sympy), which may take for ever: call
    this in a process that can be ended (`rewards/reasoning_worker.py`).

    Raises:
        ValueError: `answer` is no entry that `prompts` wrote.
    """
    reference = read(answer)
    said = response.strip().partition("\n")[0].strip()
    right, note = _score(reference, said)
    return Score(float(right), right, note or ("" if right else f"{said!r:.40}, want {reference.answer!r:.40}"))


_NOTHING = re.compile(r"[\W_]*(?:(?:nan|inf|infinity|none|null|undefined|unknown|n/?a)j?[\W_]*)*", re.IGNORECASE)
_MOST = 2000  # characters of an answer, or four times those of the reference
_DEEPEST = 40  # nested brackets
# Towers of powers and powers with long exponents, attributes that are Python's own, alternatives.
_REFUSED = re.compile(
    r"(?:\*\*|\^)(?:[\s(-]*(?:[\w.)]+\s*)?|\s*\([^()]*\)\s*)(?:\*\*|\^)"
    r"|(?:\*\*|\^)[\s(-]*(?:\d{5,}|\d[\d.]*[eE*])|<<|factorial|gamma|__|\bor\b",
    re.IGNORECASE,
)


def _score(reference: Reference, said: str) -> tuple[bool, str]:
    """Whether an answer gets upstream's full score, and a note where it does not get as far as that."""
    if len(said) > max(_MOST, 4 * len(reference.answer)):
        return False, f"an answer of {len(said)} characters"
    if not said or (_NOTHING.fullmatch(said) and not (reference.answer and _NOTHING.fullmatch(reference.answer))):
        return False, "no answer"
    if any(part[0].lower() not in reference.answer.lower() for part in _REFUSED.finditer(said)) or _deep(said):
        return False, f"{said!r:.40} is not evaluated"
    try:
        if reference.dataset in _OWN:
            return _OWN[reference.dataset](said, reference.answer), ""
        return _gym().get_score_answer_fn(reference.dataset)(said, reference.entry) == 1.0, ""
    except UPSTREAM_ERRORS as e:
        return False, f"{said!r:.40}: {type(e).__name__}"


def _deep(said: str) -> bool:
    depth = deepest = 0
    for char in said:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest > _DEEPEST


def _same_text(said: str, answer: str) -> bool:
    return said.strip(" .").casefold() == answer.strip().casefold()


def _same_number(said: str, answer: str) -> bool:
    """Equal to 1e-4, as fractions, decimals or complex numbers."""
    one, other = _number(said), _number(answer)
    return one is not None and other is not None and abs(one - other) <= 1e-4


_LOOSE = re.compile(r"\s*([-+/])\s*|\s+(?=i\b)")  # spaces that a number may have in it
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def _number(text: str) -> complex | None:
    text = _LOOSE.sub(r"\1", text.strip(" $")).replace("-$", "-").rstrip(".")
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    if "_" in text:  # Python's separator
        return None
    try:
        value = complex(Fraction(text)) if "/" in text else complex(re.sub(r"i\b", "j", text))
    except (ValueError, ArithmeticError):
        return None
    return value if cmath.isfinite(value) else None


_FRACTION = re.compile(r"(\$?)\s*(?:([0-9]+)\s*/\s*([0-9]+)|\\d?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\})\s*\1")


def _same_fraction(said: str, answer: str) -> bool:
    """The same numerator and denominator in any of upstream's four styles, and nothing else."""
    one, other = _FRACTION.fullmatch(said), _FRACTION.fullmatch(answer)
    return one is not None and other is not None and _parts(one) == _parts(other)


def _parts(fraction: re.Match[str]) -> tuple[str, str]:
    return fraction[2] or fraction[4], fraction[3] or fraction[5]


# Data sets whose scorer gives its full score to answers that are wrong (0.1.25), and what is asked instead:
# game_of_life_halting to any text, complex_arithmetic to nan, coin_flip to the first digits of the answer, gsm_symbolic
# to the answer without its sign or with others after it, fraction_simplification to a text that holds the answer.
_OWN: dict[str, Callable[[str, str], bool]] = {
    "game_of_life_halting": _same_text,
    "complex_arithmetic": _same_number,
    "coin_flip": _same_number,
    "gsm_symbolic": _same_number,
    "fraction_simplification": _same_fraction,
}


def datasets() -> Set[str]:
    """The names of upstream's data sets.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    _gym()
    from reasoning_gym.factory import DATASETS

    return DATASETS.keys()


def _line(entry: dict[str, Any]) -> str:
    return f"Question: {' '.join(entry['question'].split())} Answer:"


def _key(line: str) -> str:
    return line.partition(" Answer:")[0]


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as e:
        raise UserError("reasoning-gym is not installed; pip install reasoning-gym==0.1.25") from e
    return reasoning_gym
