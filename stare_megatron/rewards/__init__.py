"""Rewards: name -> factory. Every generated task of `stare_megatron.tasks` is one too."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable

from stare_megatron import tasks
from stare_megatron.config import RewardConfig
from stare_megatron.errors import UserError
from stare_megatron.rewards.base import Reward
from stare_megatron.rewards.exact import ExactReward
from stare_megatron.rewards.math_answer import MathReward
from stare_megatron.rewards.reasoning import ReasoningGymReward
from stare_megatron.rewards.task import TaskReward
from stare_megatron.tasks.base import Task


def _task_reward(task: Task, config: RewardConfig) -> Reward:
    return TaskReward(task)


REWARDS: dict[str, Callable[[RewardConfig], Reward]] = {
    "exact": lambda config: ExactReward(),
    "math": MathReward,
    "reasoning_gym": lambda config: ReasoningGymReward(),
    **{name: functools.partial(_task_reward, task) for name, task in tasks.TASKS.items()},
}


def check_reward(name: str) -> None:
    """Raises:
    UserError: there is no reward of that name; names the nearest.
    """
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"reward.name = {name!r}: unknown reward; did you mean {near!r}? Known: {', '.join(sorted(REWARDS))}"
        )


def make_reward(config: RewardConfig) -> Reward:
    """A new reward as `[reward]` says.

    Raises:
        UserError: there is none of that name; names the nearest.
    """
    check_reward(config.name)
    return REWARDS[config.name](config)
