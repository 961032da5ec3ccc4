"""A punishment for long responses: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), as a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stare_megatron.config.reward import LengthConfig
from stare_megatron.rewards.base import RewardKind
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LengthReward:
    """0 up to `limit` - `buffer` action tokens, from there down in a straight line to -1 at `limit`. Correct: 0."""

    def __init__(self, config: LengthConfig) -> None:
        self._config = config

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        tokens, limit, buffer = trajectory.num_action_tokens, self._config.limit, self._config.buffer
        over = tokens - (limit - buffer)
        if over <= 0 and tokens < limit:
            return Score(0.0, True, "")
        punished = 1.0 if tokens >= limit else over / buffer
        return Score(-punished, False, f"{tokens} tokens, {limit} allowed")


REWARD = RewardKind(make=LengthReward, settings=LengthConfig)
