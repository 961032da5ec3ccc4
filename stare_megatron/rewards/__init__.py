"""Rewards by name. Every generated task of `stare_megatron.tasks` is one too."""

from __future__ import annotations

from collections.abc import Iterable

from stare_megatron import tasks
from stare_megatron.config import RewardConfig
from stare_megatron.config.registry import Registry
from stare_megatron.errors import UserError
from stare_megatron.rewards import math_answer, reasoning
from stare_megatron.rewards.base import Reward, RewardError, RewardKind, nothing_to_check, response_text
from stare_megatron.rewards.exact import ExactReward
from stare_megatron.rewards.functions import from_object, text_reward
from stare_megatron.rewards.task import task_reward
from stare_megatron.types import Prompt

__all__ = [
    "REWARDS",
    "Reward",
    "RewardError",
    "RewardKind",
    "check_prompts",
    "make_reward",
    "response_text",
    "text_reward",
]

REWARDS = Registry(
    "reward.name",
    RewardKind,
    {
        "exact": RewardKind(make=lambda settings: ExactReward()),
        "math": math_answer.REWARD,
        "reasoning_gym": reasoning.REWARD,
        **{name: task_reward(task) for name, task in tasks.TASKS.items()},
    },
    adapt=from_object,
)


def make_reward(config: RewardConfig) -> Reward:
    """A new reward as `[reward]` says."""
    return REWARDS[config.name].make(config.settings)


def check_prompts(config: RewardConfig, prompts: Iterable[Prompt], where: str) -> None:
    """Ask the reward about every prompt of the files that `where` names.

    Raises:
        UserError: one that it cannot grade.
    """
    check = REWARDS[config.name].check
    for prompt in () if check is nothing_to_check else prompts:
        try:
            check(prompt)
        except ValueError as e:
            raise UserError(
                f"{where}: prompt {prompt.id!r}: reward.name = {config.name!r} cannot grade it: {e}; use prompts that "
                "were made for this reward, or another reward"
            ) from e
