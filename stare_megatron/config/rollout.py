"""Settings of sampling: `[rollout]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stare_megatron.config.base import Section

MOST_SAMPLES = 2**16
LEAST_TEMPERATURE = 0.01  # vLLM takes lower ones for this one


class RolloutConfig(Section):
    prompts_per_step: int = Field(default=64, ge=1, le=2**20, description="Groups in an update batch.")
    group_size: int = Field(default=8, ge=2, le=MOST_SAMPLES, description="Samples per prompt.")
    dynamic_sampling: bool = Field(
        default=True, description="Drop groups whose rewards are all equal and sample others."
    )
    max_refills: int = Field(
        default=10,
        ge=0,
        description="Most prompts sampled in the place of dropped ones for an update batch, in multiples of "
        "`prompts_per_step`; then zero-variance groups fill it.",
    )
    max_response_tokens: int = Field(default=3072, ge=1, description="Longest response, tokens.")
    temperature: float = Field(
        default=1.0,
        ge=LEAST_TEMPERATURE,
        le=10,
        description="Sampling temperature; the trainer scores at the same one.",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling threshold.")
    stop: list[str] = Field(default_factory=list, description="Strings that end a response (kept in it).")
    overlong: Literal["train", "mask"] = Field(
        default="train",
        description="Trajectories that the token, turn or call budget ended: learned from, or left out of the loss.",
    )

    @property
    def refills(self) -> int:
        """Most prompts that are sampled in the place of dropped ones for an update batch."""
        return self.max_refills * self.prompts_per_step if self.dynamic_sampling else 0
