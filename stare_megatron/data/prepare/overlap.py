"""When two problems are the same, and when one holds much of another.

Word n-grams against benchmarks: as in GPT-3 (arXiv 2005.14165, appendix C; n = 13); that a share of them decides, not
a single one, because contest problems end in the same sentences.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Marks of layout only: dollar signs, LaTeX brackets and spacing, sizes.
_LAYOUT = re.compile(r"\\[()\[\],;:! ]|\\(?:left|right|displaystyle|quad|qquad|limits)(?![a-z])|[$~\s]|\{,\}")
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)")
_FONT = re.compile(r"\\(?:text|math)(?:bf|it|rm|sf|normal)?\{([^{}]*)\}")
_TAIL = re.compile(r"[.?!,;:]+$")
_WORD = re.compile(r"[a-z0-9]+")


def key(text: str) -> str:
    """What two writings of one problem have in common: no case, layout, white space or end mark; signs stay."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = _LAYOUT.sub("", _FRACTION.sub(r"\\frac", text))
    return _TAIL.sub("", text)


def answer_key(text: str) -> str:
    """What two writings of one answer have in common: `key`, without fonts; `\\frac12` as `\\frac{1}{2}`."""
    before, text = "", _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", key(text))
    while before != text:
        before, text = text, _FONT.sub(r"\1", text)
    return text


def words(text: str) -> list[str]:
    """Runs of letters and digits, lower case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _grams(text: str, n: int) -> set[bytes]:
    found = words(text)
    joined = (" ".join(found[i : i + n]) for i in range(len(found) - n + 1))
    return {hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in joined}


@dataclass(frozen=True)
class Reference:
    """A problem to keep out: its id, the data set it is from, its text."""

    id: str
    source: str
    text: str


@dataclass(frozen=True)
class Hit:
    """Why a problem is kept out: the reference it equals (`overlap` 1) or shares `overlap` of its n-grams with."""

    reference: Reference
    exact: bool
    overlap: float


class Contamination:
    """Finds problems that equal or largely hold a reference.

    Overlap of a problem and a reference: shared n-grams over the n-grams of the shorter, so that a sentence added to
    either does not hide it. N-grams of `common` or more references are phrases of the trade and do not count. Problems
    under n words are compared as a whole only.
    """

    def __init__(self, references: Sequence[Reference], n: int, threshold: float, common: int) -> None:
        self._n = n
        self._threshold = threshold
        self._references = _distinct(references)
        self._by_key = {key(r.text): r for r in reversed(self._references)}
        grams = [_grams(r.text, n) for r in self._references]
        counts = Counter(gram for each in grams for gram in each)
        self._phrases = {gram for gram, count in counts.items() if count >= common}
        self._sizes = [len(each - self._phrases) for each in grams]
        self._holders: dict[bytes, list[int]] = {}
        for i, each in enumerate(grams):
            for gram in each - self._phrases:
                self._holders.setdefault(gram, []).append(i)

    def find(self, text: str) -> Hit | None:
        """The reference that the problem must be kept out for; the one with the largest overlap."""
        same = self._by_key.get(key(text))
        if same is not None:
            return Hit(same, True, 1.0)
        grams = _grams(text, self._n) - self._phrases
        shared = Counter(i for gram in grams for i in self._holders.get(gram, ()))
        best: Hit | None = None
        for i, count in sorted(shared.items()):
            overlap = count / min(len(grams), self._sizes[i])
            if overlap >= self._threshold and (best is None or overlap > best.overlap):
                best = Hit(self._references[i], False, overlap)
        return best


def _distinct(references: Sequence[Reference]) -> list[Reference]:
    """One of each: a benchmark given twice must not turn its n-grams into phrases of the trade."""
    found: dict[str, Reference] = {}
    for reference in references:
        found.setdefault(" ".join(words(reference.text)), reference)
    return list(found.values())
