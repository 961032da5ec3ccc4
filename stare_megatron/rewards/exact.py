"""The last number of the response is the answer."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING

from stare_megatron.rewards.base import response_text
from stare_megatron.rewards.math_text import ascii_of
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A sign counts unless it follows a word or number ("3-4" is a difference); commas group thousands.
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+]\s?(?:\\?[$€£¥]\s?)?)?(?:\d+(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,4}(?!\w|\.\d))?",
    re.ASCII,
)
_CURRENCY = re.compile(r"\\?[$€£¥]\s?")


class ExactReward:
    """1 if the last number of the response equals the answer in value, else 0. An answer that is no number is compared
    with the whole response, without outer white space; an empty answer is never right."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        text = ascii_of(response_text(trajectory, tokenizer, skip_special_tokens=True))
        answer = ascii_of(prompt.answer).strip()
        if not answer:
            return Score(0.0, False, "the reference answer is empty")
        wanted = _NUMBER.fullmatch(_CURRENCY.sub("", answer, count=1))
        if not wanted:
            right = text.strip() == answer
            return Score(float(right), right, "" if right else f"{text.strip()!r:.60}, want {answer!r:.60}")
        found = None
        for found in _NUMBER.finditer(text):  # noqa: B007 the last one counts
            pass
        if not found:
            return Score(0.0, False, "no number")
        right = _value(found[0]) == _value(wanted[0])
        return Score(float(right), right, "" if right else f"{found[0]:.60}, want {answer:.60}")


def _value(number: str) -> Decimal:
    return Decimal(re.sub(r"[^\d.eE+-]", "", number))
