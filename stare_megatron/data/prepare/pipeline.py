"""From published files to a prompt file: extract, deduplicate, keep benchmarks out, write with a manifest.

What is written depends on the files and the settings alone; every row that is not written is counted and, but for
plain repetitions, listed with the reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stare_megatron.data.prepare import extract, overlap, store
from stare_megatron.data.prepare.hub import Source
from stare_megatron.data.prepare.overlap import Contamination, Reference
from stare_megatron.data.prepare.programs import INSTRUCTION as PROGRAM
from stare_megatron.data.prepare.settings import INSTRUCTION, Settings
from stare_megatron.data.prepare.types import Counts, Malformed, Problem, Recipe, Removed, Unsuitable
from stare_megatron.errors import UserError

_SHOWN = 20  # malformed rows reported one by one


@dataclass(frozen=True)
class _Extracted:
    rows: int
    repeated: int
    malformed: tuple[Malformed, ...]
    unsuitable: tuple[Unsuitable, ...]
    conflicts: tuple[tuple[Problem, Problem], ...]  # the kept problem, the one with another answer
    problems: tuple[Problem, ...]


def prepare(recipe: Recipe, source: Source, settings: Settings, out: Path, report: Callable[[str], None]) -> Counts:
    """Prepare a data set and write `out` with its companions (`store.py`). `report` gets a line for each malformed row.

    Raises:
        UserError: unreadable files, malformed rows without `settings.skip_malformed`, nothing left to write.
    """
    found = _extract(recipe, source.files)
    tell_malformed(found.malformed, found.rows, settings, report)
    left_out = [Removed("", item.place, item.reason, item.problem) for item in found.unsuitable]
    removed: list[Removed] = []
    kept = _without_conflicts(recipe, found, settings, removed)
    conflicting = len(removed)
    references = [r for path in settings.against for r in store.read_references(path)]
    kept = _without_contamination(recipe, kept, references, settings, removed)
    same = sum(r.reason.startswith("same text") for r in removed)
    if not kept:
        raise UserError(f"{source.files[0]}: nothing left to write of {found.rows} rows; see --against and --overlap")
    counts = Counts(
        rows=found.rows,
        malformed=len(found.malformed),
        unsuitable=len(left_out),
        repeated=found.repeated,
        conflicting=conflicting,
        same=same,
        overlapping=len(removed) - conflicting - same,
        written=len(kept),
    )
    rows = [_row(recipe, problem, settings) for problem in kept]
    store.write(out, rows, [*left_out, *removed], found.malformed, recipe, source, settings, counts)
    return counts


def tell_malformed(
    malformed: Sequence[Malformed], rows: int, settings: Settings, report: Callable[[str], None]
) -> None:
    """`report` gets a line for each of the first, and one for the rest.

    Raises:
        UserError: there are malformed rows among the `rows`, and no `settings.skip_malformed`.
    """
    for broken in malformed[:_SHOWN]:
        report(broken.line())
    if len(malformed) > _SHOWN:
        report(f"and {len(malformed) - _SHOWN} more")
    if malformed and not settings.skip_malformed:
        raise UserError(
            f"{len(malformed)} of {rows} rows are malformed; fix the file, or leave them out (and have them listed) "
            "with --skip-malformed"
        )


def _extract(recipe: Recipe, files: Sequence[Path]) -> _Extracted:
    """All files in one pass; of a problem met again only its answer is looked at, so memory is that of the distinct."""
    rows = repeated = 0
    malformed: list[Malformed] = []
    unsuitable: list[Unsuitable] = []
    conflicts: list[tuple[Problem, Problem]] = []
    first: dict[bytes, Problem] = {}
    for item in _items(recipe, files):
        rows += 1
        if isinstance(item, Malformed):
            malformed.append(item)
            continue
        if isinstance(item, Unsuitable):
            unsuitable.append(item)
            continue
        digest = hashlib.blake2b(overlap.key(item.text).encode(), digest_size=16).digest()
        kept = first.setdefault(digest, item)
        if kept is item:
            continue
        if _same_answers(kept, item):
            repeated += 1
        else:
            conflicts.append((kept, item))
    problems = tuple(first.values())
    return _Extracted(rows, repeated, tuple(malformed), tuple(unsuitable), tuple(conflicts), problems)


def _items(recipe: Recipe, files: Sequence[Path]) -> Iterator[Problem | Malformed | Unsuitable]:
    for path in files:
        yield from extract.problems(recipe, path)


def _same_answers(a: Problem, b: Problem) -> bool:
    return {overlap.answer_key(x) for x in a.answers} == {overlap.answer_key(x) for x in b.answers}


def _without_conflicts(recipe: Recipe, found: _Extracted, settings: Settings, removed: list[Removed]) -> list[Problem]:
    """Which of two answers is right cannot be known here: all rows of such a problem go, or all but the first."""
    doubtful: set[str] = set()
    for kept, other in found.conflicts:
        reason = f"same text as {kept.place}, whose answer is {_answer(kept)!r:.60}, not {_answer(other)!r:.60}"
        removed.append(_removed(recipe, other, f"conflicting answer: {reason}"))
        doubtful.add(kept.place)
    if settings.conflicts == "first":
        return list(found.problems)
    for problem in found.problems:
        if problem.place in doubtful:
            reason = f"conflicting answer: another row has this text and another answer than {_answer(problem)!r:.60}"
            removed.append(_removed(recipe, problem, reason))
    return [problem for problem in found.problems if problem.place not in doubtful]


def _without_contamination(
    recipe: Recipe, problems: list[Problem], references: list[Reference], settings: Settings, removed: list[Removed]
) -> list[Problem]:
    if not references:
        return problems
    contamination = Contamination(references, settings.ngram, settings.overlap, settings.common)
    kept = []
    for problem in problems:
        hit = contamination.find(problem.text)
        if hit is None:
            kept.append(problem)
            continue
        what = f"{hit.reference.id} ({hit.reference.source})"
        share = f"shares {hit.overlap:.2f} of its {settings.ngram}-grams with {what}"
        removed.append(_removed(recipe, problem, f"same text as {what}" if hit.exact else share))
    return kept


def _removed(recipe: Recipe, problem: Problem, reason: str) -> Removed:
    return Removed(_id(recipe, problem), problem.place, reason, problem.text)


def _row(recipe: Recipe, problem: Problem, settings: Settings) -> dict[str, Any]:
    """A row of the prompt file; `problem` is the text without instructions, which decontamination compares."""
    instruction = settings.instruction
    if problem.tests and instruction == INSTRUCTION:  # which asks for a box
        instruction = PROGRAM
    text = f"{problem.text}\n{instruction}" if instruction else problem.text
    prompt: str | list[dict[str, str]] = text
    if settings.form == "chat":
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        prompt = [*system, {"role": "user", "content": text}]
    row = {
        "id": _id(recipe, problem),
        "source": settings.source or recipe.name,
        "prompt": prompt,
        "answer": "-" if problem.tests else _answer(problem),
        "problem": problem.text,
    } | ({"tests": problem.tests} if problem.tests else {})
    return row | ({"published_id": problem.published_id} if problem.published_id else {})


def _id(recipe: Recipe, problem: Problem) -> str:
    """From the text, so that it does not change with files, order or settings; unique after deduplication."""
    return f"{recipe.name}-{hashlib.blake2b(overlap.key(problem.text).encode(), digest_size=8).hexdigest()}"


def _answer(problem: Problem) -> str:
    """One answer as it is, alternatives as a JSON list (which the `math` reward reads as such)."""
    if len(problem.answers) == 1:
        return re.sub(r"\s*\n\s*", " ", problem.answers[0])
    return json.dumps(problem.answers, ensure_ascii=False)
