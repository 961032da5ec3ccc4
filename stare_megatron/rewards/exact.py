"""The last number of the response is the answer."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING

from stare_megatron.rewards.base import response_text
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A sign counts unless it follows a word or number ("3-4" is a difference); commas group thousands.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?", re.ASCII)


class ExactReward:
    """1 if the last number of the response equals the answer in value, else 0. An answer that is no number is compared
    with the whole response, without outer white space."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        text = response_text(trajectory, tokenizer, skip_special_tokens=True)
        answer = prompt.answer.strip()
        if not _NUMBER.fullmatch(answer):
            right = text.strip() == answer
            return Score(float(right), right, "" if right else f"{text.strip()!r:.60}, want {answer!r}")
        found = _NUMBER.findall(text)
        if not found:
            return Score(0.0, False, "no number")
        right = _value(found[-1]) == _value(answer)
        return Score(float(right), right, "" if right else f"{found[-1]}, want {answer}")


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
