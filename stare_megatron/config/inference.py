"""Settings of the engines: `[inference]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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
    restarts: int = Field(
        default=3,
        ge=0,
        description="Times that an engine which is lost is started again, without an hour of health between; 0: never.",
    )
    restart_backoff: float = Field(
        default=5.0,
        ge=0,
        description="Seconds before the second restart, twice as long before each later one; the first comes at once.",
    )
    min_engines: int = Field(
        default=0,
        ge=0,
        description="Engines, those that are being started again included, below which the run ends, saved; 0: half of "
        "them, rounded up.",
    )
    answer_timeout: float = Field(
        default=60.0,
        gt=0,
        description="Seconds of silence after which an engine, or an idle trainer rank, counts as lost; after a sixth "
        "of it an engine gets no new groups.",
    )
    vllm: PassThrough = Field(default_factory=dict, description="Further vLLM EngineArgs, by their upstream names.")

    @model_validator(mode="after")
    def _has_as_many(self) -> InferenceConfig:
        if self.min_engines > self.engines:
            raise ValueError(f"min_engines = {self.min_engines} of engines = {self.engines}; lower it")
        return self

    @property
    def fewest_engines(self) -> int:
        """`min_engines`, settled."""
        return self.min_engines or (self.engines + 1) // 2
