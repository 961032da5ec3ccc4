"""Rewards: name -> factory. Every generated task of `stare_megatron.tasks` is one too."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable

from stare_megatron import tasks
from stare_megatron.errors import UserError
from stare_megatron.rewards.base import Reward
from stare_megatron.rewards.exact import ExactReward
from stare_megatron.rewards.math_answer import MathReward
from stare_megatron.rewards.reasoning import ReasoningGymReward
from stare_megatron.rewards.task import TaskReward

REWARDS: dict[str, Callable[[], Reward]] = {
    "exact": ExactReward,
    "math": MathReward,
    "reasoning_gym": ReasoningGymReward,
    **{name: functools.partial(TaskReward, task) for name, task in tasks.TASKS.items()},
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


def make_reward(name: str) -> Reward:
    """A new reward of that name.

    Raises:
        UserError: there is none; names the nearest.
    """
    check_reward(name)
    return REWARDS[name]()
