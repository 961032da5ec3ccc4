"""Settings of supervised training, `stare-megatron sft`: tables of its own, and those of `train` that apply."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stare_megatron.config.base import Free, Section, Text
from stare_megatron.config.checkpoint import CheckpointConfig
from stare_megatron.config.cluster import ClusterConfig
from stare_megatron.config.config import Config
from stare_megatron.config.data import TEMPLATE_VARIABLES, Date, TemplateVariables
from stare_megatron.config.logging import LoggingConfig
from stare_megatron.config.model import ModelConfig
from stare_megatron.config.run import RunConfig
from stare_megatron.config.trainer import TrainerConfig
from stare_megatron.config.watchdog import WatchdogConfig

# Of tables that `train` has too: what would do nothing here, and why.
_IDLE = {
    ("trainer", "updates_per_batch"): "a batch is one optimizer step; set sft.batch_sequences",
    ("trainer", "scoring"): "nothing is scored before an update",
    ("checkpoint", "local"): "its checkpoints go to the run's folder",
    ("logging", "samples_every"): "nothing is sampled",
    ("logging", "reflection_words"): "nothing is sampled",
    ("logging", "plan_constants"): "no plan is said; plan sft.toml --constants FILE reads it",
}


class SftRunConfig(RunConfig):
    steps: Free[int] = Field(default=0, ge=0, description="Optimizer steps at most; 0: as many as `sft.epochs` take.")


class SftDataConfig(Section):
    train: Free[list[Path]] = Field(min_length=1, description="Files of conversations, JSONL or parquet.")
    eval: Free[list[Path]] = Field(default=[], description="Held-out files, of the same form; empty: no held-out loss.")
    messages_key: Text = Field(
        default="messages", description="Column with the chat messages of a conversation; learned: the assistant's."
    )
    parts_key: Text = Field(
        default="parts",
        description="Column with the last message of the assistant, or the completion, in pieces, "
        '`{"text": ..., "learn": true or false}`; learned: those with `learn`.',
    )
    prompt_key: Text = Field(
        default="prompt", description="Column with the prompt: a string, or a list of chat messages. Not learned."
    )
    completion_key: Text = Field(
        default="completion", description="Column with what follows the prompt: a string, or a list of chat messages."
    )
    chat_template: bool = Field(
        default=False, description="Write a string prompt and its completion as messages in the chat template."
    )
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, description=TEMPLATE_VARIABLES)
    date: Date = Field(
        default="",
        description="Date, YYYY-MM-DD, for chat templates that write today's; empty: of the run's first start.",
    )
    shuffle: bool = Field(default=True, description="Shuffle the conversations again in each epoch (seeded).")


class SftTable(Section):
    epochs: Free[int] = Field(default=1, ge=1, le=1000, description="Passes over the conversations.")
    batch_sequences: int = Field(default=32, ge=1, description="Sequences of an optimizer step.")
    batch_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens of an optimizer step: as many sequences as fit, at least one, instead of "
        "`batch_sequences`; 0: by sequences.",
    )
    max_tokens: int = Field(default=4096, ge=2, description="Longest sequence, tokens.")
    overlong: Literal["truncate", "drop", "refuse"] = Field(
        default="truncate",
        description="What to do with longer ones: cut their end off or drop them, both counted, or refuse to start.",
    )
    eval_every: Free[int] = Field(
        default=0, ge=0, description="Measure the held-out loss every n steps; 0: after each epoch."
    )


class SftConfig(Section):
    """A whole supervised run."""

    run: SftRunConfig = Field(default_factory=lambda: SftRunConfig(), description="The run itself.")
    model: ModelConfig = Field(description="The model.")
    data: SftDataConfig = Field(description="Conversations.")
    sft: SftTable = Field(default_factory=lambda: SftTable(), description="Supervised training, the command `sft`.")
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig(), description="Megatron-Core ranks.")
    checkpoint: Free[CheckpointConfig] = Field(default_factory=lambda: CheckpointConfig(), description="What is saved.")
    logging: Free[LoggingConfig] = Field(default_factory=lambda: LoggingConfig(), description="Where metrics go.")
    cluster: Free[ClusterConfig] = Field(default_factory=lambda: ClusterConfig(), description="Ray.")
    watchdog: Free[WatchdogConfig] = Field(
        default_factory=lambda: WatchdogConfig(), description="What is done about hangs."
    )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.run.name

    def own_files(self) -> dict[str, Path]:
        """Of the user's objects: it names none."""
        return {}

    def dated(self, date: str) -> SftConfig:
        """With `data.date` settled."""
        return self.model_copy(update={"data": self.data.model_copy(update={"date": date})})

    def lasting(self, steps: int) -> SftConfig:
        """With `run.steps` settled."""
        return self.model_copy(update={"run": self.run.model_copy(update={"steps": steps})})

    def for_ranks(self) -> Config:
        """What the trainer's ranks, their placement and the run's folder take their settings from: a run of `train`
        without engines, whose window is `sft.max_tokens`. Where `run.steps` is not settled, it has one step."""
        tree = {
            "run": self.run.model_dump() | {"steps": max(self.run.steps, 1)},
            "model": self.model.model_dump(),
            "data": {"train": self.data.train, "max_prompt_tokens": self.sft.max_tokens - 1},
            "reward": {"name": "exact"},  # of nothing
            "rollout": {"max_response_tokens": 1, "prompts_per_step": self.trainer.data_parallel, "group_size": 2},
            "algorithm": {"method": "grpo"},
        }
        config = Config.model_validate(tree)
        mine = {
            name: self.__dict__[name] for name in ("model", "trainer", "checkpoint", "logging", "cluster", "watchdog")
        }
        none = {"engines": 0, "placement": "colocated"}
        return config.model_copy(update=mine | {"inference": config.inference.model_copy(update=none)})

    @model_validator(mode="after")
    def _cross(self) -> SftConfig:
        for (table, key), why in _IDLE.items():
            section: Section = self.__dict__[table]
            value = section.__dict__[key]
            if value != type(section).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(
                    f"{table}.{key} = {value!r:.60} does nothing in supervised training: {why}; leave it out"
                )
        if "parameters" in self.trainer.offload:
            raise ValueError(
                f'trainer.offload = {self.trainer.offload}: nobody wants the room of "parameters", there are no '
                "engines; take it out"
            )
        if self.sft.eval_every and not self.data.eval:
            raise ValueError(f"sft.eval_every = {self.sft.eval_every}, and data.eval names no file; name one")
        if self.sft.batch_tokens and self.sft.batch_sequences != type(self.sft).model_fields["batch_sequences"].default:
            raise ValueError("sft.batch_tokens and sft.batch_sequences are both set; choose one")
        if 0 < self.sft.batch_tokens < self.sft.max_tokens:
            raise ValueError(
                f"sft.batch_tokens = {self.sft.batch_tokens} is less than one sequence, sft.max_tokens = "
                f"{self.sft.max_tokens}; raise the one or lower the other"
            )
        dtype = self.model.dtype
        if fault := self.trainer.optimizer.type_fault(dtype) or self.trainer.fp8_type_fault(dtype):
            raise ValueError(fault)
        fault = self.trainer.optimizer.fault(self.run.steps) if self.run.steps else ""
        if fault and not self.trainer.optimizer.short_warmup:
            raise ValueError(fault)
        return self
