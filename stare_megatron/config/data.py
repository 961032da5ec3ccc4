"""Settings of the prompts: `[data]`."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from stare_megatron.config.base import Free, Section, Text


def _iso(text: str) -> str:
    if text and datetime.date.fromisoformat(text).isoformat() != text:
        raise ValueError(f"{text!r} is no date of the form YYYY-MM-DD")
    return text


Date = Annotated[str, AfterValidator(_iso)]

# What a chat template is given by whoever renders it.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")


def _variables(given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if not name.isidentifier() or name in _GIVEN or name.endswith("_token"):
            raise ValueError(f"{name!r} is no variable that can be given to a chat template")
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} = {value!r}; want true, false, a text or a finite number")
    return given


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_variables)]
TEMPLATE_VARIABLES = (
    "Variables for the chat template, as `enable_thinking = false` for Qwen3's; refused where it names no such."
)


class DataConfig(Section):
    train: Free[list[Path]] = Field(min_length=1, description="Prompt files, JSONL or parquet.")
    prompt_key: Text = Field(
        default="prompt", description="Column with the prompt: a string, or a list of chat messages."
    )
    answer_key: Text = Field(default="answer", description="Column with the reference answer given to the reward.")
    id_key: Text = Field(default="id", description="Column with a unique id; rows without it are numbered `file:line`.")
    source_key: Text = Field(default="source", description="Column with the row's source; the file's stem if absent.")
    extra_keys: list[str] = Field(
        default_factory=list,
        description="Further columns that reward and environment read, as `prompt.extra`; those that your own objects "
        "declare are added.",
    )
    chat_template: bool = Field(
        default=False, description="Wrap a string prompt as a user message in the chat template."
    )
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict, description=TEMPLATE_VARIABLES)
    date: Date = Field(
        default="",
        description="Date, YYYY-MM-DD, for chat templates that write today's; empty: of the run's first start, also "
        "when it is resumed later.",
    )
    shuffle: bool = Field(default=True, description="Shuffle the prompts again in each epoch (seeded).")
    max_prompt_tokens: int = Field(default=1024, ge=1, description="Longest prompt, tokens.")
    overlong_prompts: Free[Literal["drop", "refuse"]] = Field(
        default="drop",
        description="What to do with longer prompts: drop and count them, or refuse to start.",
    )
