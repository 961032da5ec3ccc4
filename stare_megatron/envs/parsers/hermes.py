"""The Hermes and Qwen form: `<tool_call>{"name": "python", "arguments": {"code": "..."}}</tool_call>`, its result in a
turn of its own between the boundaries that the tokenizer's chat template writes around a tool's message.

    ...<tool_call>\\n{"name": ...}\\n</tool_call><|im_end|>\\n<|im_start|>user\\n<tool_response>\\n
    1180591620717411303424\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n

Sources: NousResearch/Hermes-Function-Calling, README; the chat template of Qwen2.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stare_megatron.data.chat import TEMPLATE_ERRORS
from stare_megatron.data.json_text import decode_line
from stare_megatron.data.tokenizer import ends_a_sequence, first_line
from stare_megatron.envs.parsers.base import Encoder, Malformed, Parsed, Request
from stare_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{OPEN}(.*?)(?:{CLOSE}|$)", re.DOTALL)
_ACTION, _FIRST, _SECOND = "stareaction", "starefirst", "staresecond"  # marks in a rendered conversation


class Hermes:
    """`tool`: the one name that is known. `parallel`: the policy ends its turns itself, and each may hold calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tool: str, *, parallel: bool) -> None:
        """Raises:
        UserError: the chat template does not render tool messages.
        """
        encoder = Encoder(tokenizer)
        self._tool = tool
        self._parallel = parallel
        self._before, self._between, self._after = (encoder.form(text) for text in _boundaries(tokenizer))
        self._ends_turn = ends_a_sequence(self._before[:1], tokenizer)

    @property
    def stop(self) -> tuple[str, ...]:
        return () if self._parallel else (CLOSE,)

    def parse(self, text: str, *, ended: bool) -> Parsed:
        trailing = ""
        if not self._parallel and CLOSE in text:  # the turn was to end there, whatever its last token brought more
            text, _, trailing = text.partition(CLOSE)
            text += CLOSE
        found = list(_CALL.finditer(text))
        if found:
            calls = tuple(self._read(match[1], closed=match[0].endswith(CLOSE)) for match in found)
            return Parsed(calls, trailing or text[found[-1].end() :])
        if CLOSE not in text:
            return Parsed(())
        return Parsed((Malformed("", f"{CLOSE} without {OPEN}"),), trailing or text.partition(CLOSE)[2])

    def render(self, text: str, results: Sequence[Sequence[int]], *, ended: bool) -> list[int] | None:
        tokens = self._before
        if ended:
            # It stands for the template's own, though it may be another of the checkpoint's.
            if not self._ends_turn:
                return None
            tokens = tokens[1:]
        for i, result in enumerate(results):
            tokens = [*tokens, *(self._between if i else ()), *result]
        return [*tokens, *self._after]

    def _read(self, body: str, *, closed: bool) -> Request | Malformed:
        if not closed:
            return Malformed("", f"{OPEN} without {CLOSE}")
        try:
            call = decode_line(body)
        except ValueError as e:
            return Malformed("", f"the call is not valid JSON: {e}")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return Malformed("", 'the call must be a JSON object with "name" and "arguments"')
        name, arguments = call["name"], call.get("arguments")
        if name != self._tool:
            return Malformed(name, f"unknown tool {name!r:.80}; known: {self._tool!r}")
        if not isinstance(arguments, dict) or not isinstance(arguments.get("code"), str):
            return Malformed(name, f'"arguments" of {name!r} must be an object with a string "code"')
        return Request(name, arguments["code"])


def _boundaries(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What the chat template writes between an action and the first result, between two, and after the last."""
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _ACTION},
        {"role": "tool", "name": "tool", "content": _FIRST},
        {"role": "tool", "name": "tool", "content": _SECOND},
    ]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TEMPLATE_ERRORS as e:
        raise UserError(_complaint(f"cannot be used: {first_line(e)}")) from e
    parts = re.split(f"{_ACTION}|{_FIRST}|{_SECOND}", text)
    if len(parts) != 4 or not all(parts[1:]):
        raise UserError(_complaint("does not show what tools answer"))
    return parts[1], parts[2], parts[3]


def _complaint(what: str) -> str:
    return (
        f'env.parser = "hermes": the chat template of the tokenizer in model.path {what}; use a tokenizer whose '
        'template renders messages of the role "tool", or env.parser = "retool" or "fenced"'
    )
