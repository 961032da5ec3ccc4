"""Settings of the KL to a reference policy: `[algorithm.kl]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stare_megatron.config.base import Free, Section
from stare_megatron.host.paths import absolute

Estimator = Literal["k1", "k2", "k3"]


class KlConfig(Section):
    coefficient: float = Field(
        default=0.0, ge=0, description="Factor of the KL to the reference policy, docs/kl.md; 0: off, no reference."
    )
    place: Literal["loss", "reward"] = Field(
        default="loss",
        description="Where the term goes: onto the loss of each token, or, summed over the response, off the reward "
        "before the advantage.",
    )
    estimator: Estimator = Field(
        default="k3",
        description="Of a sampled token, with d = log policy - log reference: `k1` d (reward only), `k2` d^2 / 2 (in "
        "the loss its gradient is that of the reverse KL), `k3` e^-d - 1 + d (GRPO's).",
    )
    reference: Free[str] = Field(
        default="",
        description="Hugging Face folder of the reference policy, of the same architecture and vocabulary; empty: the "
        "model that the run begins with.",
    )
    residency: Free[Literal["host", "device"]] = Field(
        default="host",
        description="Where a rank keeps the reference's parameters: in host memory, on its GPU during the reference "
        "pass alone, or always on its GPU.",
    )

    @property
    def on(self) -> bool:
        return self.coefficient > 0

    @property
    def on_host(self) -> bool:
        """Whether ranks keep a copy of their parameters in host memory for it."""
        return self.on and self.residency == "host"

    @property
    def on_device(self) -> bool:
        """Whether they keep it on their devices."""
        return self.on and self.residency == "device"

    @field_validator("reference")
    @classmethod
    def _from_here(cls, value: str) -> str:
        return str(absolute(Path(value))) if value else ""

    @model_validator(mode="after")
    def _gradient(self) -> KlConfig:
        if self.on and self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                'kl.estimator = "k1" with kl.place = "loss": the gradient of log policy has mean 0 over the policy\'s '
                'own samples, so that it holds nothing back; set kl.estimator = "k2", or kl.place = "reward"'
            )
        return self
