"""Settings of the run itself: `[run]`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from stare_megatron.config.base import Free, Section, explained
from stare_megatron.host.paths import absolute

NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"  # of files and folders: neither hidden, nor an option of a command


class RunConfig(Section):
    name: Free[str] = Field(
        default="run",
        max_length=100,
        pattern=NAME,
        description="Name of the run and its folder: letters, digits, `.`, `_`, `-`.",
    )
    dir: Free[Path] = Field(default=Path("runs"), validate_default=True, description="Folder that holds run folders.")
    steps: Free[int] = Field(ge=1, description="Optimizer steps to train for.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of everything random in the run.")
    restarts: Free[int] = Field(
        default=2,
        ge=0,
        description="Times that the trainer's ranks are started again from the last checkpoint, without ending the "
        "run, when one of them is lost; 0: never.",
    )
    min_free_mb: Free[int] = Field(
        default=0,
        ge=0,
        description="Free disk space a start asks for, MB; 0: estimated from the model and `[checkpoint]`.",
    )
    resume: Free[str] = Field(
        default="never",
        description="`never`: refuse a run folder that already has a checkpoint; `auto`: continue from its newest one; "
        "or the path of a checkpoint folder.",
    )
    resume_allow: Free[list[str]] = Field(
        default_factory=list,
        description="Keys or tables that may differ from those of the checkpoint although they change what is trained; "
        "see docs/checkpoints.md.",
    )

    @field_validator("resume")
    @classmethod
    def _where(cls, resume: str) -> str:
        word = resume.strip().lower()
        with explained():
            if word in ("never", "auto") and resume != word:
                raise ValueError(f"did you mean {word!r}? A folder of that name is ./{resume}")
            return resume if word in ("never", "auto") else str(absolute(resume))
