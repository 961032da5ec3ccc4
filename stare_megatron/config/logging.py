"""Settings of metrics and samples: `[logging]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from stare_megatron.config.base import Section, Text, explained
from stare_megatron.host.paths import absolute

REFLECTION_WORDS = (
    "wait",
    "however",
    "hmm",
    "alternatively",
    "actually",
    "let me check",
    "let me verify",
    "let's check",
    "let's verify",
    "double-check",
    "recheck",
    "reconsider",
    "on second thought",
)


_TAG = 64


class LoggingConfig(Section):
    tensorboard: bool = Field(default=True, description="Write TensorBoard event files.")
    wandb: Literal["offline", "online", "disabled"] = Field(default="offline", description="Weights & Biases mode.")
    wandb_project: Text = Field(default="stare_megatron", description="Weights & Biases project.")
    wandb_entity: str = Field(default="", description="Its user or team; empty: the one logged in.")
    wandb_group: str = Field(default="", description="Group that its pages put the run in; empty: none.")
    wandb_job_type: str = Field(default="", description='Its kind of the run, e.g. "sweep"; empty: none.')
    wandb_system: bool = Field(
        default=False, description="Its charts of the driver's machine: GPUs, CPUs, memory, disk, network."
    )
    wandb_samples: bool = Field(default=False, description="Its table of sampled trajectories, as in `samples/`.")
    wandb_tags: list[str] = Field(default_factory=list, description="Its tags of the run.")
    wandb_notes: str = Field(default="", description="Its notes on the run.")
    prometheus_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port at which the driver gives the newest values to Prometheus, at `/metrics`; 0: none.",
    )
    prometheus_host: Text = Field(
        default="127.0.0.1", description="Address it listens on there; 0.0.0.0: all of the machine, to anyone."
    )
    samples_every: int = Field(
        default=10, ge=0, description="Write sampled trajectories, as text and as data, every n steps; 0: never."
    )
    samples: int = Field(default=4, ge=1, description="Trajectories written each time.")
    trace: bool = Field(
        default=True, description="Write what each process does when, for `stare-megatron trace RUN`; at most 64 MB."
    )
    plan_constants: str = Field(
        default="",
        description="File of `plan --calibrate` whose constants the plan has that a run says at its start and its end; "
        "empty: the package's.",
    )
    reflection_words: list[str] = Field(
        default_factory=lambda: list(REFLECTION_WORDS),
        description="Words and phrases counted in responses, whole and in any case; empty: nothing is counted.",
    )

    @field_validator("plan_constants")
    @classmethod
    def _where(cls, file: str) -> str:
        with explained():
            return str(absolute(file)) if file else ""

    @model_validator(mode="after")
    def _words(self) -> LoggingConfig:
        if not all(word.strip() for word in self.reflection_words):
            raise ValueError("reflection_words holds an empty word; remove it")
        if long := next((tag for tag in self.wandb_tags if len(tag) > _TAG), ""):
            raise ValueError(f"wandb_tags holds {long!r}; Weights & Biases takes tags of at most {_TAG} characters")
        return self
