"""Settings of the engines: `[inference]`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stare_megatron.config.base import PassThrough, Section

_MOST_DRAFTED = 32
_DRAFTS = (
    "vLLM drafts with weights of its own then, which pushes do not reach: drafts would be those of the first policy, "
    "and fewer accepted at every step"
)
_UNUSABLE: dict[str, str] = {
    **dict.fromkeys(("draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "mtp", "dflash", "dspark"), _DRAFTS),
    "suffix": "it needs arctic-inference, which nothing here is tried with",
    "ngram_gpu": "the policy's sampler is not held to it",
}


class SpeculativeConfig(Section):
    method: Literal["off", "ngram"] = Field(
        default="off",
        description="`ngram`: tokens that followed the same last tokens before, in the prompt or the response, are "
        "drafted, and checked in one pass; see docs/dispatch.md.",
    )
    tokens: int = Field(default=4, ge=1, le=_MOST_DRAFTED, description="Tokens drafted at a time, at most.")
    ngram_min: int = Field(default=2, ge=1, le=_MOST_DRAFTED, description="Fewest last tokens that are looked for.")
    ngram_max: int = Field(default=4, ge=1, le=_MOST_DRAFTED, description="Most last tokens that are looked for.")

    @field_validator("method", mode="before")
    @classmethod
    def _drafts_without_weights(cls, value: Any) -> Any:
        if isinstance(value, str) and value in _UNUSABLE:
            raise ValueError(f'{value!r} does not work here: {_UNUSABLE[value]}; take "ngram" or "off"')
        return value

    @model_validator(mode="after")
    def _has_a_length(self) -> SpeculativeConfig:
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ngram_min = {self.ngram_min} is more than ngram_max = {self.ngram_max}; lower it")
        return self

    @property
    def on(self) -> bool:
        return self.method != "off"

    @property
    def engine_args(self) -> dict[str, Any]:
        """What vLLM's EngineArgs hold of it."""
        settings = {
            "method": self.method,
            "num_speculative_tokens": self.tokens,
            "prompt_lookup_min": self.ngram_min,
            "prompt_lookup_max": self.ngram_max,
        }
        return {"speculative_config": settings} if self.on else {}


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
    spread_below: int = Field(
        default=0,
        ge=0,
        description="Prompts of fewer tokens have their samples spread over the engines; those of others share one, "
        "and its prefix cache. 0: never; see docs/dispatch.md.",
    )
    longest_first: bool = Field(
        default=True,
        description="Of requests that come together, those are served first whose responses were the longest so far.",
    )
    speculative: SpeculativeConfig = Field(
        default_factory=SpeculativeConfig,
        description="Drafts: exact, and quicker where few sequences run.",
    )
    vllm: PassThrough = Field(default_factory=dict, description="Further vLLM EngineArgs, by their upstream names.")

    @model_validator(mode="after")
    def _has_as_many(self) -> InferenceConfig:
        if self.min_engines > self.engines:
            raise ValueError(f"min_engines = {self.min_engines} of engines = {self.engines}; lower it")
        return self

    @model_validator(mode="after")
    def _checks_every_draft(self) -> InferenceConfig:
        """Where a step's tokens do not suffice some drafts are cut short, by what else runs: seeds would not repeat."""
        if not self.speculative.on:
            return self
        if self.routing_replay:
            raise ValueError(
                'speculative.method = "ngram" does not go with routing_replay = true: vLLM returns experts from its '
                "second model runner alone, which is not held to drafts here; turn one off"
            )
        sequences, tokens = self.vllm.get("max_num_seqs"), self.vllm.get("max_num_batched_tokens")
        if (
            isinstance(sequences, int)
            and isinstance(tokens, int)
            and tokens < sequences * (1 + self.speculative.tokens)
        ):
            raise ValueError(
                f"vllm.max_num_batched_tokens = {tokens} is less than vllm.max_num_seqs = {sequences} sequences with "
                f"1 + speculative.tokens = {1 + self.speculative.tokens} each; raise the one or lower the others"
            )
        return self

    @property
    def fewest_engines(self) -> int:
        """`min_engines`, settled."""
        return self.min_engines or (self.engines + 1) // 2
