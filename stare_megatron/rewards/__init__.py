"""Rewards by name. Every generated task of `stare_megatron.tasks` is one too."""

from __future__ import annotations

from stare_megatron import tasks
from stare_megatron.config import RewardConfig
from stare_megatron.config.registry import Registry
from stare_megatron.rewards import math_answer
from stare_megatron.rewards.base import Reward, RewardError, RewardKind, response_text
from stare_megatron.rewards.exact import ExactReward
from stare_megatron.rewards.functions import from_object, text_reward
from stare_megatron.rewards.reasoning import ReasoningGymReward
from stare_megatron.rewards.task import task_reward

__all__ = ["REWARDS", "Reward", "RewardError", "RewardKind", "make_reward", "response_text", "text_reward"]

REWARDS = Registry(
    "reward.name",
    RewardKind,
    {
        "exact": RewardKind(make=lambda settings: ExactReward()),
        "math": math_answer.REWARD,
        "reasoning_gym": RewardKind(make=lambda settings: ReasoningGymReward()),
        **{name: task_reward(task) for name, task in tasks.TASKS.items()},
    },
    adapt=from_object,
)


def make_reward(config: RewardConfig) -> Reward:
    """A new reward as `[reward]` says."""
    return REWARDS[config.name].make(config.settings)
