"""The error model, on one page.

* Data: a bad rollout (truncated, failed, not graded) is a `Status` on its trajectory. It is counted and, where it
  cannot be learned from, masked. Nothing is raised.
* `UserError`: the user's configuration, files or machine are wrong. Raised before anything is started, printed as one
  line that names the culprit and the cure, exit code 2.
* `RunError`: the run cannot go on (non-finite loss, an engine that disagrees with the trainer, a dead actor). The run
  stops with one line that names the culprit, and where its logs are and how to resume it below; exit code 1.
* `LostError`, a `RunError`: a process is gone, or silent, for a reason outside of it. What it did is done again by
  others where that is possible; else the run stops with exit code 75, so that a scheduler starts it again.
* Anything else is a bug, and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

# What code raises that is not ours, short of what ends a process; an exception class of its own shows its traceback.
ORDINARY = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError),
)
LOST = 75
"""Exit code after a `LostError`: sysexits.h calls it EX_TEMPFAIL, a failure to be tried again."""
_NEAR = 0.6  # of difflib's ratio; below it two words have little in common
_NO_SYNONYMS: Mapping[str, str] = MappingProxyType({})


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and the cure."""


class MissingFilesError(UserError):
    """Some trainer rank does not have a file of a checkpoint. Nothing was read of it, but optimizers lose their state:
    another checkpoint must be loaded, or the ranks started again."""


class RunError(Exception):
    """The run must stop. The message is one line naming the culprit."""


class HangError(RunError):
    """Nobody answers any more. `culprits`: the names of the processes at fault, which have been ended; none where it is
    no process, or is not known."""

    def __init__(self, message: str, culprits: tuple[str, ...]) -> None:
        super().__init__(message)
        self.culprits = culprits


class LostError(RunError):
    """A process is gone or does not answer; the same work may succeed elsewhere, or later."""


class EngineLostError(LostError):
    """An engine is."""


class GivenUpError(RunError):
    """Sampling was ended because whoever waited for it does not want it any more."""


class GroupsLostError(LostError):
    """Sampled groups are, with the node that had them, before they were learned from."""


class RanksLostError(LostError):
    """A trainer rank is, so that the others, which wait for it, are of no use either."""


def ending(error: UserError | RunError | KeyboardInterrupt, what: str) -> tuple[str, int]:
    """What a command that this ended says, and its exit code. `what`: the command was at, such as "the run"."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, RunError):
        return f"{what} stopped: {error}", LOST if isinstance(error, LostError) else 1
    return "interrupted", 130


def nearest(word: str, candidates: Iterable[str], synonyms: Mapping[str, str] = _NO_SYNONYMS) -> str:
    """The candidate that `word` most likely means, "" where none is near. Case, `-` for `_` and spaces are no
    difference.

    `synonyms`: what others call it, in lower case with `_` -> the candidate, or several, separated by spaces.
    """
    plain = {_plain(candidate): candidate for candidate in candidates}
    found = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=_NEAR)
    if found and found[0] == _plain(word):
        return plain[found[0]]
    return synonyms.get(word) or synonyms.get(_plain(word)) or (plain[found[0]] if found else "")


def _plain(word: str) -> str:
    return word.strip().casefold().replace("-", "_").replace(" ", "_")


def suggest(word: str, candidates: Iterable[str], synonyms: Mapping[str, str] = _NO_SYNONYMS) -> str:
    """The end of a message about an unknown `word`: "; did you mean 'x'?", or "" where none is near.

    Example:
        suggest("clip_ratio", keys, {"clip_ratio": "clip_low clip_high"}) == "; did you mean 'clip_low' or 'clip_high'?"
    """
    found = nearest(word, candidates, synonyms).split()
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
