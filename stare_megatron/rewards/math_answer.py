"""Mathematical answers by math-verify, in worker processes: sympy can take minutes or memory without end, and
math-verify's own time-outs are signals, which work on a main thread only and swallow what they interrupt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stare_megatron.config.reward import WorkerConfig
from stare_megatron.rewards.base import RewardError, RewardKind, response_text
from stare_megatron.rewards.workers import WorkerError, WorkerLimits, WorkerPool
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MathReward:
    """1 if the last `\\boxed{...}` of the response (without one: what it states to be its answer) is mathematically
    equal to the reference answer, else 0. docs/rewards.md has the rules."""

    def __init__(self, config: WorkerConfig) -> None:
        limits = WorkerLimits(config.timeout, config.memory_mb << 20)
        self._pool = WorkerPool("stare_megatron.rewards.math_worker", config.processes, limits)

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        text = response_text(trajectory, tokenizer, skip_special_tokens=True)
        try:
            verdict = await self._pool.call({"answer": prompt.answer, "response": text})
        except WorkerError as e:
            raise RewardError(str(e)) from e
        if not verdict["graded"]:
            raise RewardError(str(verdict["note"]))
        right = bool(verdict["correct"])
        return Score(float(right), right, str(verdict["note"]))

    async def close(self) -> None:
        """End the worker processes; they also end with the process that made them."""
        await self._pool.close()


REWARD = RewardKind(make=MathReward, settings=WorkerConfig)
