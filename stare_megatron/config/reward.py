"""Settings of the reward: `[reward]`."""

from __future__ import annotations

from pydantic import Field

from stare_megatron.config.base import Section


class RewardConfig(Section):
    name: str = Field(description="Reward function, a name from the rewards registry, e.g. `math`, `order_free_sum`.")
    timeout: float = Field(
        default=10.0,
        gt=0,
        description="Seconds one answer may take to grade (`math`); then it counts as not graded and carries no loss.",
    )
    processes: int = Field(default=2, ge=1, description="Grading processes of each engine (`math`).")
    memory_mb: int = Field(
        default=1024,
        ge=256,
        description="Memory of a grading process, MB; an answer that takes more counts as not graded.",
    )
