"""Settings of weight pushes: `[sync]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stare_megatron.config.base import Section


class SyncConfig(Section):
    method: Literal["auto", "sharded", "whole"] = Field(
        default="auto",
        description="How weights go to the engines. `sharded`: each rank sends each engine worker the parts of tensors "
        "it needs; `whole`: rank 0 sends whole tensors to all; `auto`: `sharded` on CPUs, `whole` on GPUs, where "
        "`sharded` (CUDA IPC, NCCL) has not run yet.",
    )
    push_timeout: float = Field(
        default=0.0,
        ge=0,
        description="Seconds a push may take before the run stops; 0: 300, and 1 for each 100 MB of the model's "
        "weights.",
    )
    probe_every: int = Field(
        default=1, ge=0, description="Compare engine and trainer log-probs after every n-th push; 0: never."
    )
    probe_threshold: float = Field(
        default=0.0,
        ge=0,
        description="Largest mean |log-prob difference| on the probe prompt, nats; beyond it the run stops. 0: follows "
        "from `model.dtype`: 1e-3 in float32, in lower precision from what the first push measures; checksums of the "
        "weights are compared, too (docs/faq.md).",
    )
