"""Settings of the policy: `[model]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from stare_megatron.config.base import Free, Section, explained
from stare_megatron.host.paths import absolute


class ModelConfig(Section):
    path: Free[Path] = Field(description="Hugging Face checkpoint folder: config.json, safetensors, tokenizer.")
    weights: Free[str] = Field(
        default="",
        description="Megatron-Core checkpoint folder whose weights the policy begins with instead of those in "
        "`model.path`: a converted one, or `.../checkpoints/step_N/trainer` of another run; empty: none.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16",
        description="Compute dtype of trainer and engines; gradients are summed and weights updated in float32. "
        "float16 scales the loss (`trainer.optimizer.initial_loss_scale`); dense models only.",
    )

    @field_validator("weights")
    @classmethod
    def _where(cls, weights: str) -> str:
        with explained():
            return str(absolute(weights)) if weights else ""
