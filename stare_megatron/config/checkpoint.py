"""Settings of what is saved: `[checkpoint]`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from stare_megatron.config.base import Section


class CheckpointConfig(Section):
    every: int = Field(
        default=25, ge=0, description="Save every n steps; 0: only at the end, on a wish to stop and after an error."
    )
    asynchronous: bool = Field(
        default=True, description="Copy the state and write it while training goes on; false: wait until it is on disk."
    )
    keep_last: int = Field(default=2, ge=1, description="Newest training checkpoints kept.")
    keep_every: int = Field(
        default=0, ge=0, description="Training checkpoints of steps that are multiples stay; 0: none."
    )
    best_metric: str = Field(
        default="",
        description="Metric of metrics.jsonl or eval.jsonl, e.g. `eval/avg`: the checkpoint with the best value stays; "
        "empty: none.",
    )
    best_mode: Literal["max", "min"] = Field(default="max", description="Which value of `best_metric` is the best.")
    verify: bool = Field(
        default=True,
        description="Compare checksums, which reads every byte, before a checkpoint is loaded; false: sizes only.",
    )
    export_every: int = Field(
        default=0,
        ge=0,
        description="Write the policy as a Hugging Face checkpoint every n steps, to `exports/`; 0: never.",
    )
    export_final: bool = Field(default=True, description="Write the final policy as a Hugging Face checkpoint.")

    local: str = Field(
        default="",
        description="A folder on every node's own disk: saves go there, and copies of them to the run's folder "
        "meanwhile; empty: saves go to the run's folder.",
    )
    local_keep: int = Field(default=1, ge=1, description="Newest checkpoints kept in `local`.")
    durable_every: int = Field(
        default=1,
        ge=1,
        description="Every n-th save in `local` is copied to the run's folder; the last goes there in any case.",
    )

    def local_overlap(self, run: Path) -> Path | None:
        """A run's folder, resolved, where `local` is that folder, or one lies in the other."""
        one, other = Path(self.local).resolve(), run.resolve()
        overlap = one.is_relative_to(other) or other.is_relative_to(one)
        return other if self.local and overlap else None

    @model_validator(mode="after")
    def _local(self) -> CheckpointConfig:
        if self.local and not Path(self.local).is_absolute():
            raise ValueError(
                f"local = {self.local!r}: processes of the nodes begin in other folders; give an absolute path"
            )
        for key, value in {"local_keep": self.local_keep, "durable_every": self.durable_every}.items():
            if value != 1 and not self.local:
                raise ValueError(f"{key} = {value} is for checkpoint.local, which is empty; set it")
        return self

    @model_validator(mode="after")
    def _best(self) -> CheckpointConfig:
        if self.best_mode != "max" and not self.best_metric:
            raise ValueError(f"best_mode = {self.best_mode!r} is for best_metric, which is empty; set it")
        return self
