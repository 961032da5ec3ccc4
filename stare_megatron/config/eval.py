"""Settings of evaluation: `[eval]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from stare_megatron.config.base import Section
from stare_megatron.config.rollout import LEAST_TEMPERATURE, MOST_SAMPLES
from stare_megatron.config.run import NAME


class BenchmarkConfig(Section):
    path: Path = Field(description="Prompt file, JSONL or parquet, with the keys of `[data]`.")
    name: str = Field(
        default="",
        max_length=100,
        pattern=rf"^$|{NAME}",
        description="Name in metrics and files; empty: the file's without its end.",
    )
    samples: int = Field(default=0, ge=0, le=MOST_SAMPLES, description="k: samples a prompt; 0: `eval.samples`.")

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _named(self) -> BenchmarkConfig:
        if not self.name:
            stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in self.path.stem)
            object.__setattr__(self, "name", stem.lstrip(".-")[:100] or "_")  # frozen from here on
        return self


class EvalConfig(Section):
    every: int = Field(default=0, ge=0, description="Evaluate after every n-th step; 0: not by step.")
    at_start: bool = Field(default=True, description="Evaluate before the first step.")
    at_end: bool = Field(default=True, description="Evaluate after the last step.")
    benchmarks: list[BenchmarkConfig] = Field(
        default_factory=list,
        description="Held-out prompts: a path each, or a table with `path`, `name` (empty: the file's name without its "
        "end) and `samples` (0: `eval.samples`). Empty: no evaluation.",
    )
    samples: int = Field(
        default=8, ge=1, le=MOST_SAMPLES, description="k: samples a prompt, for avg@k and pass@1, 2, 4, ... up to k."
    )
    temperature: float = Field(
        default=1.0,
        ge=LEAST_TEMPERATURE,
        le=2,
        description="Temperature of the samples; greedy decoding is `greedy`.",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling threshold of the samples.")
    greedy: bool = Field(default=True, description="Also decode each prompt once greedily.")
    max_response_tokens: int = Field(
        default=0, ge=0, description="Longest response, tokens; 0: `rollout.max_response_tokens`."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the samples: the same at every step and in every run."
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Level of the confidence intervals.")
    responses: int = Field(
        default=4, ge=0, description="Responses of each prompt kept for reading, beside the greedy one."
    )

    def wanted(self, step: int, steps: int) -> bool:
        """Whether the policy of `step` of `steps` is to be evaluated."""
        by_number = bool(self.every and step and step % self.every == 0)
        ends = (self.at_start and step == 0) or (self.at_end and step == steps)
        return bool(self.benchmarks) and (by_number or ends)

    @model_validator(mode="after")
    def _names(self) -> EvalConfig:
        seen: dict[str, Path] = {}
        for benchmark in self.benchmarks:
            if benchmark.name in seen:
                raise ValueError(
                    f"benchmarks: {seen[benchmark.name]} and {benchmark.path} are both called {benchmark.name!r}; "
                    "give one another name"
                )
            seen[benchmark.name] = benchmark.path
        if self.every and not self.benchmarks:
            raise ValueError(f"every = {self.every}, but benchmarks is empty; name a file of held-out prompts")
        return self
