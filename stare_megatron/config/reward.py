"""Settings of the reward: `[reward]`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stare_megatron.config.base import Free, Section, Text
from stare_megatron.config.registry import OpenTable


class WorkerConfig(Section):
    """Settings of the rewards that grade in processes of their own: `math` and `reasoning_gym`."""

    timeout: float = Field(
        default=10.0,
        gt=0,
        description="`math`, `reasoning_gym`: seconds one answer may take to grade; then it counts as not graded and "
        "carries no loss (`math`), or as wrong (`reasoning_gym`).",
    )
    processes: Free[int] = Field(default=2, ge=1, description="The same: grading processes of each engine.")
    memory_mb: Free[int] = Field(
        default=1024,
        ge=256,
        description="The same: memory of a grading process, MB; an answer that takes more counts as one that takes "
        "too long.",
    )


class RewardConfig(OpenTable):
    registry: ClassVar[str] = "stare_megatron.rewards:REWARDS"

    name: Text = Field(
        description="Reward: a name from the registry, e.g. `math`, `order_free_sum`, or your own, "
        "`package.module:object` or `path/to/file.py:object`, docs/adding_a_reward.md. The other keys are its settings."
    )
