"""The scorer of a reasoning-gym task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stare_megatron.rewards.base import response_text
from stare_megatron.tasks import reasoning
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReasoningGymReward:
    """1 if reasoning-gym gives the first line of the response its full score, else 0. The prompt's answer is what
    `tools/make_reasoning_prompts.py` wrote."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        return reasoning.verify(prompt.answer, response_text(trajectory, tokenizer, skip_special_tokens=True))
