"""The scorer of a reasoning-gym task, in worker processes: upstream's scorers evaluate what the policy wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stare_megatron.config.reward import WorkerConfig
from stare_megatron.rewards.base import RewardKind, response_text
from stare_megatron.rewards.workers import WorkerError, WorkerLimits, WorkerPool
from stare_megatron.tasks import reasoning
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReasoningGymReward:
    """1 if reasoning-gym gives the first line of the response its full score, else 0; also if it takes too long. The
    prompt's answer is what `tools/make_reasoning_prompts.py` wrote."""

    def __init__(self, config: WorkerConfig) -> None:
        limits = WorkerLimits(config.timeout, config.memory_mb << 20)
        self._pool = WorkerPool("stare_megatron.rewards.reasoning_worker", config.processes, limits)

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        text = response_text(trajectory, tokenizer, skip_special_tokens=True)
        try:
            verdict = await self._pool.call({"answer": prompt.answer, "response": text})
        except WorkerError as e:
            return Score(0.0, False, str(e))
        right = bool(verdict["correct"])
        return Score(float(right), right, str(verdict["note"]))

    async def close(self) -> None:
        """End the worker processes; they also end with the process that made them."""
        await self._pool.close()


def _check(prompt: Prompt) -> None:
    reasoning.read(prompt.answer)


REWARD = RewardKind(make=ReasoningGymReward, settings=WorkerConfig, check=_check)
