"""The strict verifier of a generated task."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from stare_megatron.rewards.base import RewardError, RewardKind, response_text
from stare_megatron.tasks.base import Task
from stare_megatron.types import Prompt, Score, Status, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPTS = 1024  # that are remembered as checked


class TaskReward:
    """1 for a right response that ended by itself, else 0. Special tokens in its middle make it wrong."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._check = functools.lru_cache(_PROMPTS)(task.check)  # the answers to a prompt come one after the other

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Raises:
        RewardError: the prompt is none of the task's.
        """
        try:
            self._check(prompt.text, prompt.answer)
        except ValueError as e:
            raise RewardError(str(e)) from e
        if trajectory.status is not Status.COMPLETED:
            return Score(0.0, False, "did not end by itself")
        return self._task.verify(
            prompt.text, prompt.answer, response_text(trajectory, tokenizer, skip_special_tokens=False)
        )


def task_reward(task: Task) -> RewardKind:
    """The verifier of a task as a reward without settings."""
    return RewardKind(
        make=lambda settings: TaskReward(task), check=lambda prompt: task.check(prompt.text, prompt.answer)
    )
