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
    quantization: Literal["none", "fp8_per_channel"] = Field(
        default="none",
        description="How engines keep and multiply the matrices of their layers: in `model.dtype`, or in float8, "
        "quantized again with every push; see docs/quantization.md.",
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

    def quantization_fault(self, dtype: str, correction: str, scoring: str, probe_every: int, threshold: float) -> str:
        """Why engines may not be quantized with `model.dtype`, `algorithm.correction.mode`, `trainer.scoring`,
        `sync.probe_every` and `sync.probe_threshold`, with the cure; "" where they may."""
        if self.quantization == "none":
            return ""
        key = f'inference.quantization = "{self.quantization}"'
        if dtype == "float32":
            return f'{key} is of 16-bit weights; set model.dtype = "bfloat16" or "float16"'
        if scoring == "rollout":
            return (
                f"{key}: the engines' log-probs are not those of the policy about to be updated; set trainer.scoring = "
                '"trainer"'
            )
        if correction == "none":
            return (
                f"{key} samples from a policy that differs from the trained one, and algorithm.correction.mode = "
                '"none" learns as if it did not; set algorithm.correction.mode = "truncate" or "mask" '
                "(docs/rollout_correction.md)"
            )
        if not (probe_every and threshold):
            return (
                f"{key} needs a bound on how far engine and trainer may be apart, which checksums cannot tell of "
                "quantized weights; set sync.probe_threshold, for instance to 0.2 nats, and sync.probe_every of at "
                "least 1 (docs/quantization.md)"
            )
        return ""

    @property
    def fewest_engines(self) -> int:
        """`min_engines`, settled."""
        return self.min_engines or (self.engines + 1) // 2
