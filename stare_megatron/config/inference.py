"""Settings of the engines: `[inference]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stare_megatron.config.base import PassThrough, Section


class InferenceConfig(Section):
    engines: int = Field(default=1, ge=1, le=2**16, description="vLLM engines.")
    tensor_parallel: int = Field(default=1, ge=1, le=2**10, description="TP of each engine; one GPU a rank.")
    placement: Literal["colocated", "separate"] = Field(
        default="colocated", description="Engines share the trainer's devices and take turns, or have their own."
    )
    max_model_len: int = Field(
        default=0, ge=0, description="Engine window, tokens; 0: longest prompt + longest response."
    )
    routing_replay: bool = Field(
        default=False,
        description="Mixtures of experts: engines return the experts of every token, and scoring and update route by "
        "them; see docs/routing_replay.md.",
    )
    vllm: PassThrough = Field(default_factory=dict, description="Further vLLM EngineArgs, by their upstream names.")
