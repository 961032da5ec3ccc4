"""Chat messages written out by the checkpoint's template, which may leave out what it does not know."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from stare_megatron.data.rows import is_blank, shown
from stare_megatron.data.tokenizer import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template can raise, which is code of the checkpoint.
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_THOUGHT = "</think>"  # templates leave out what an assistant thought in earlier turns


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for today's date: `strftime_now` is the only clock that transformers gives it."""
    return "strftime_now" in str(tokenizer.chat_template)


class ChatTemplate:
    """The chat template of a tokenizer. What it makes of messages is tried once for each sequence of roles, keys
    and whether the contents are blank.

    `date`: the day it is for the template, and midnight, ISO; empty: today.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str) -> None:
        self._tokenizer = tokenizer
        # Handed over as a variable, it hides the clock that transformers gives.
        self._clock: dict[str, Any] = {}
        if date:
            self._clock["strftime_now"] = datetime.datetime.fromisoformat(date).strftime
        self._tried: dict[tuple[tuple[str, bool, frozenset[str]], ...], str | None] = {}

    def render(self, messages: list[Any]) -> str:
        """The prompt that asks for the next message. No content is lost on the way: white space around it may be.

        Raises:
            ValueError: no such messages, a template that refuses them, or one that leaves one out.
        """
        checked = [checked_message(i, message) for i, message in enumerate(messages)]
        if all(is_blank(message["content"]) for message in checked):
            raise ValueError("no message with a text")
        if checked[-1]["role"] == "assistant":
            raise ValueError(
                "the last message is the assistant's; a prompt ends before the policy's turn: leave it out"
            )
        if not self._tokenizer.chat_template:
            raise ValueError("a chat prompt, but the checkpoint's tokenizer has no chat template")
        text = self.write(checked)
        self.check_whole(checked, text)
        return text

    def check_whole(self, messages: list[dict[str, Any]], text: str) -> None:
        """Raises: ValueError: `text`, which the template made of the messages, lacks one of them."""
        lost = next((message["role"] for message in messages if not _is_in(message, text)), None)
        lost = self._ignored(messages) if lost is None else lost
        if lost is not None:
            raise ValueError(f"the chat template leaves out the message of role {lost!r:.60}; use a role that it knows")

    def write(self, messages: list[dict[str, Any]], *, ask: bool = True) -> str:
        """What the template makes of messages. `ask`: with what asks for the next one, the generation prompt.

        Raises:
            ValueError: the template refuses them.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False, **self._clock)
            )
        except TEMPLATE_ERRORS as e:
            raise ValueError(f"the chat template refuses it: {first_line(e)}") from e

    def _ignored(self, messages: list[dict[str, Any]]) -> str | None:
        """A role whose messages the template does not write out: a content may be in the text for another reason."""
        kinds = tuple((m["role"], is_blank(m["content"]), frozenset(m)) for m in messages)
        if kinds not in self._tried:
            # A blank content, which a call of a tool has, stays: a template may write out the call in its place.
            marks = ["" if blank else f"staremark{i}x" for i, (_, blank, _) in enumerate(kinds)]
            try:
                text = self.write([m | {"content": k or m["content"]} for m, k in zip(messages, marks, strict=True)])
            except ValueError:  # a template that looks into the contents: they have been found already
                text = "".join(marks)
            lost = (role for (role, *_), mark in zip(kinds, marks, strict=True) if mark not in text)
            self._tried[kinds] = next(lost, None)
        return self._tried[kinds]


def checked_message(place: int, message: Any) -> dict[str, Any]:
    """Raises: ValueError: not a message with a role and a text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"want messages with 'role' and 'content', texts, got {shown(message)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(
            f"message {place + 1}: want messages with 'role' and 'content', texts; the content is "
            f"{shown(message.get('content'))}"
        )
    return {key: value for key, value in message.items() if value is not None}  # parquet gives all of them all keys


def _is_in(message: dict[str, Any], text: str) -> bool:
    content = message["content"]
    if message["role"] == "assistant":
        content = content.rpartition(_THOUGHT)[2]
    content = content.strip()
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text  # as Llama writes tools' answers
