"""Rows of supervised training as text in pieces, of which some are learned.

Three forms, told apart by their columns (names as in `[data]`):

    {"messages": [{"role": ..., "content": ...}, ...]}                       learned: what the assistant says
    {"messages": [...], "parts": [{"text": ..., "learn": true}, ...]}        the same, the last answer in pieces
    {"prompt": ..., "completion": ...}, or "parts" in place of it            learned: the completion, and its end

What an assistant says is found by writing the conversation three times with the chat template: up to its turn with the
generation prompt, up to its turn's end, and whole. So it is exactly what a policy would be asked for and would answer,
whatever the template is. Learned is also the token that ends the turn, and not the white space after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stare_megatron.config import SftDataConfig
from stare_megatron.data import rows
from stare_megatron.data.chat import ChatTemplate, checked_message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """A run of text, all of it learned or none."""

    text: str
    learn: bool


@dataclass(frozen=True)
class Written:
    """A sequence to be. `rendered`: by a chat template, which writes special tokens itself; else the tokenizer adds its
    own to the first piece, and the end-of-sequence token is added where `ends`, learned."""

    pieces: tuple[Piece, ...]
    rendered: bool
    ends: bool


class Refused(Exception):
    """Why the value of `key` cannot be used."""

    def __init__(self, key: str, why: object) -> None:
        super().__init__(why)
        self.key = key


class Writer:
    """Turns rows into text."""

    def __init__(self, config: SftDataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._has_template = bool(tokenizer.chat_template)
        self._template = ChatTemplate(tokenizer, config.date)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._ends = tuple(special | {str(tokenizer.eos_token)})

    def written(self, row: dict[str, Any]) -> list[Written]:
        """The sequences of a row: one, or one for each answer where the template writes earlier ones otherwise once
        others follow (as those do that leave out what was thought).

        Raises:
            Refused: names the column, what is wrong and the cure.
        """
        c = self._config
        messages, prompt, completion, parts = (
            None if (value := rows.find(row, key)) is rows.ABSENT else value
            for key in (c.messages_key, c.prompt_key, c.completion_key, c.parts_key)
        )
        if messages is not None:
            return self._conversation(c.messages_key, _messages(c.messages_key, messages), 0, parts)
        if prompt is None or (completion is None and parts is None):
            lacks = f"no {c.messages_key!r}, and no {c.prompt_key!r} with {c.completion_key!r}"
            has = ", ".join(map(repr, row)) or "none"
            raise Refused(c.messages_key, f"{lacks}; the row has {has}; set data.messages_key, or the other two")
        if isinstance(prompt, str) and not isinstance(completion, list) and not c.chat_template:
            return [self._plain(prompt, completion, parts)]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if completion is None:
            completion = "".join(piece.text for piece in _parts(c.parts_key, parts))
        answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        before = _messages(c.prompt_key, asked)
        after = _messages(c.completion_key, answered)
        return self._conversation(c.completion_key, [*before, *after], len(before), parts)

    def _plain(self, prompt: str, completion: Any, parts: Any) -> Written:
        c = self._config
        if rows.is_blank(prompt) or rows.is_written_messages(prompt):
            why = "empty or blank" if rows.is_blank(prompt) else "messages written as one string; store the list itself"
            raise Refused(c.prompt_key, why)
        pieces = [Piece(str(completion), True)]
        if parts is not None:
            pieces = _parts(c.parts_key, parts)
            _check_same(c.parts_key, pieces, completion)
        elif not isinstance(completion, str) or not completion:
            raise Refused(c.completion_key, f"want a text or a list of messages, got {rows.shown(completion)}")
        return Written((Piece(prompt, False), *pieces), rendered=False, ends=pieces[-1].learn)

    def _conversation(self, key: str, messages: list[dict[str, Any]], first: int, parts: Any) -> list[Written]:
        """`first`: the place of the first message that may be learned; `key`: the column to blame."""
        if not self._has_template:
            cure = "give prompt and completion as texts, or a tokenizer with a template"
            raise Refused(key, f"chat messages, but the checkpoint's tokenizer has no chat template; {cure}")
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            raise Refused(key, "no message of the role 'assistant', so that there is nothing to learn")
        if turns[0] == 0:
            raise Refused(key, "the first message is the assistant's; a prompt comes first")
        try:
            answers = [self._answer(messages, i) for i in turns]
            whole = self._template.write(messages, ask=False)
            chained = all(whole.startswith(asked + answer) for asked, answer in answers)
            self._template.check_whole(messages, whole)
        except ValueError as e:
            raise Refused(key, e) from e
        found: list[list[Piece]] = []
        for (asked, answer), turn in zip(answers, turns, strict=True):
            own = [Piece(answer, True)]
            if parts is not None and turn == turns[-1]:
                own = _apart(self._config.parts_key, _parts(self._config.parts_key, parts), messages[turn], answer)
            own = self._to_its_end(own)
            if found and chained:
                done = "".join(piece.text for piece in found[-1])
                found[-1] += [Piece(asked[len(done) :], False), *own]
            else:
                found.append([Piece(asked, False), *own])
        return [Written(tuple(pieces), rendered=True, ends=False) for pieces in found]

    def _answer(self, messages: list[dict[str, Any]], turn: int) -> tuple[str, str]:
        """What asks for a turn, and what the assistant writes then.

        Raises:
            ValueError: the template does not write the turn after what asks for it, or loses some of it.
        """
        asked = self._template.write(messages[:turn])
        told = self._template.write(messages[: turn + 1], ask=False)
        if not told.startswith(asked):
            raise ValueError(
                f"message {turn + 1}: the chat template asks for it with {asked[-40:]!r}, and writes it without; give "
                "prompt and completion as texts"
            )
        answer = told[len(asked) :]
        if _packed(messages[turn]["content"]) not in _packed(answer):
            raise ValueError(
                f"message {turn + 1}: the chat template leaves out a part of what the assistant says; give prompt and "
                "completion as texts"
            )
        if not answer.rstrip().endswith(self._ends):
            raise ValueError(
                f"message {turn + 1}: the chat template ends it with {answer[-20:]!r}, no special token of the "
                "tokenizer, so that a policy would not learn to stop; mend the template"
            )
        return asked, answer

    def _to_its_end(self, pieces: list[Piece]) -> list[Piece]:
        """Without the white space after the token that ends the turn."""
        *others, last = pieces
        return [*others, Piece(last.text.rstrip(), last.learn)]


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece, for a tokenizer may join what meets; empty ones left out."""
    kinds = itertools.groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.learn)
    return [Piece("".join(piece.text for piece in run), learn) for learn, run in kinds]


def _messages(key: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Refused(key, f"want a list of messages with 'role' and 'content', got {rows.shown(value)}")
    try:
        return [checked_message(i, _spoken(message)) for i, message in enumerate(value)]
    except ValueError as e:
        raise Refused(key, e) from e


def _spoken(message: Any) -> Any:
    """A call of a tool may come without a text."""
    silent = isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None
    return message | {"content": ""} if silent else message


def _parts(key: str, value: Any) -> list[Piece]:
    if not isinstance(value, list) or not value:
        raise Refused(key, f"want a list of {{'text': ..., 'learn': true or false}}, got {rows.shown(value)}")
    pieces = []
    for n, part in enumerate(value, start=1):
        whole = isinstance(part, dict) and isinstance(part.get("text"), str) and isinstance(part.get("learn"), bool)
        if not whole:
            raise Refused(key, f"part {n}: want {{'text': ..., 'learn': true or false}}, got {rows.shown(part)}")
        pieces.append(Piece(part["text"], part["learn"]))
    if not any(piece.learn and piece.text for piece in pieces):
        raise Refused(key, "no part has 'learn' true, so that there is nothing to learn")
    return pieces


def _check_same(key: str, pieces: list[Piece], text: Any) -> None:
    if text is not None and text != "".join(piece.text for piece in pieces):
        raise Refused(key, "the parts are not the text that they are parts of; give one of the two")


def _apart(key: str, pieces: list[Piece], message: dict[str, Any], answer: str) -> list[Piece]:
    """The answer in pieces: what the template writes around the message goes with its first and last part."""
    _check_same(key, pieces, message["content"])
    pieces = merged(pieces)
    text = "".join(piece.text for piece in pieces)
    if text not in answer:  # a template may take white space off both ends
        first, last = pieces[0], pieces[-1]
        pieces[0] = Piece(first.text.lstrip(), first.learn)
        pieces[-1] = Piece(pieces[-1].text.rstrip(), last.learn)
        text = "".join(piece.text for piece in pieces)
    before, found, after = answer.partition(text)
    if not found:
        raise Refused(
            key, "the chat template writes the message otherwise than its parts; give prompt and parts as texts"
        )
    return [Piece(before, pieces[0].learn), *pieces, Piece(after, pieces[-1].learn)]


def _packed(text: str) -> str:
    return "".join(text.split())
