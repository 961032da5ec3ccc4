"""What a parser is: it finds the calls in what was just sampled, and writes their results as tokens.

It reads text and writes tokens, never the other way: the sampled tokens stay in the stream as they were sampled, and
what follows them is encoded once. Results are tool output, written by code that the policy wrote: text in them that
looks like a special token, or like a form's own tokens, is encoded as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """Code to run.

    Example:
        Request("python", "print(2 ** 70)")
    """

    tool: str
    code: str


@dataclass(frozen=True)
class Malformed:
    """A call that cannot be run; `error` is what the policy is told.

    Example:
        Malformed("pyton", "unknown tool 'pyton'; known: 'python'")
    """

    tool: str
    error: str


@dataclass(frozen=True)
class Parsed:
    """What a turn asks for. `trailing`: text after its last call. `unfinished`: the turn was stopped where neither a
    call nor an answer ends, and goes on.

    Example:
        Parsed((Request("python", "print(1)"),), trailing="\\n", unfinished=False)
    """

    calls: tuple[Request | Malformed, ...]
    trailing: str = ""
    unfinished: bool = False


class Parser(Protocol):
    """One form of writing calls."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings at which a turn ends; they stay in it."""
        ...

    def parse(self, text: str, *, ended: bool) -> Parsed:
        """The calls in a turn's text. `ended`: the policy ended it with its end-of-sequence token, not in `text`."""
        ...

    def render(self, text: str, results: Sequence[Sequence[int]], *, ended: bool) -> list[int] | None:
        """Tokens that follow a turn with calls: boundaries and results; after them the policy writes on.

        `results`: the tokens of each call's result. None: nothing can follow exactly these sampled tokens.
        """
        ...


class Encoder:
    """Text -> tokens, in two ways that must not be confused."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        # The longest first: of two that begin at one place it is the one the tokenizer would take.
        found = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True) if len(token) > 1)
        self._added = re.compile(found) if found else None

    def form(self, text: str) -> list[int]:
        """Text of the form itself: special tokens in it are special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def plain(self, text: str) -> list[int]:
        """Text of others: a special or added token that is spelled out in it becomes ordinary tokens.

        Each such place is encoded in two pieces, parted after its first character.
        """
        tokens, begin = [], 0
        while self._added and (match := self._added.search(text, begin)):
            tokens += self.form(text[begin : match.start() + 1])
            begin = match.start() + 1
        return tokens + self.form(text[begin:])


def newline_before(text: str) -> str:
    """What brings what follows `text` to a line of its own."""
    return "" if text.endswith("\n") else "\n"


def answer_within(
    encoder: Encoder, text: str, results: Sequence[Sequence[int]], begin: str, end: str, *, ended: bool
) -> list[int] | None:
    """`Parser.render` of forms that answer a call within the policy's own response: each result from `begin` to `end`,
    on lines of its own after `text`. Nothing can follow an end of sequence there."""
    if ended:
        return None
    head, tail = encoder.form(newline_before(text) + begin), encoder.form(end)
    return [token for result in results for token in (*head, *result, *tail)]
