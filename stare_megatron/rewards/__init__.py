"""Rewards by name. Every generated task of `stare_megatron.tasks` is one too."""

from __future__ import annotations

from collections.abc import Iterable

from stare_megatron import tasks
from stare_megatron.config import RewardConfig, SandboxConfig
from stare_megatron.config.registry import Registry
from stare_megatron.errors import UserError
from stare_megatron.rewards import code_answer, judge, length, math_answer, reasoning, response_format, weighted_sum
from stare_megatron.rewards.base import (
    Reward,
    RewardContext,
    RewardError,
    RewardKind,
    nothing_to_check,
    response_text,
)
from stare_megatron.rewards.exact import ExactReward
from stare_megatron.rewards.functions import from_object, text_reward
from stare_megatron.rewards.task import task_reward
from stare_megatron.sandbox.client import SandboxClient
from stare_megatron.types import Prompt

__all__ = [
    "PARTS",
    "REWARDS",
    "Reward",
    "RewardContext",
    "RewardError",
    "RewardKind",
    "check_prompts",
    "make_reward",
    "response_text",
    "text_reward",
]

_KINDS = {
    "code": code_answer.REWARD,
    "exact": RewardKind(make=lambda settings: ExactReward()),
    "format": response_format.REWARD,
    "judge": judge.REWARD,
    "length": length.REWARD,
    "math": math_answer.REWARD,
    "reasoning_gym": reasoning.REWARD,
    **{name: task_reward(task) for name, task in tasks.TASKS.items()},
}
# What may be a part of a sum: everything but sums.
PARTS = Registry("reward.parts.name", RewardKind, _KINDS, adapt=from_object)
REWARDS = Registry("reward.name", RewardKind, _KINDS | {"sum": weighted_sum.REWARD}, adapt=from_object)


def make_reward(config: RewardConfig, box: SandboxClient | None = None, sandbox: SandboxConfig | None = None) -> Reward:
    """A new reward as `[reward]` says. `box`: an open sandbox of `sandbox`, for a reward that runs code.

    Raises:
        ValueError: such a reward without a box.
    """
    kind = REWARDS[config.name]
    if kind.runs_code(config.settings) and box is None:
        raise ValueError(f"reward.name = {config.name!r} needs a sandbox")
    return kind.build(RewardContext(config.settings, box, sandbox or SandboxConfig()))


def check_prompts(
    config: RewardConfig, prompts: Iterable[Prompt], where: str, sandbox: SandboxConfig | None = None
) -> None:
    """Ask the reward about every prompt of the files that `where` names.

    Raises:
        UserError: one that it cannot grade, or that it can grade nothing here.
    """
    check = REWARDS[config.name].checker(RewardContext(config.settings, sandbox=sandbox or SandboxConfig()))
    for prompt in () if check is nothing_to_check else prompts:
        try:
            check(prompt)
        except ValueError as e:
            raise UserError(
                f"{where}: prompt {prompt.id!r}: reward.name = {config.name!r} cannot grade it: {e}; use prompts that "
                "were made for this reward, or another reward"
            ) from e
