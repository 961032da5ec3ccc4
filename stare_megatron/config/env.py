"""Settings of the environment that the policy acts in: `[env]`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from stare_megatron.config.base import Section


class EnvConfig(Section):
    name: Literal["single_turn", "tool_use"] = Field(
        default="single_turn",
        description="`single_turn`: one response a prompt; `tool_use`: code the policy writes is run and it goes on, "
        "docs/tool_use.md. The other keys are for `tool_use`.",
    )
    parser: Literal["hermes", "retool", "fenced"] = Field(
        default="hermes",
        description="How a call is written: `<tool_call>` JSON between chat turns, `<code>` ... `<interpreter>`, or a "
        "fenced block of Python.",
    )
    tool: str = Field(
        default="python", min_length=1, description="Name of the tool in a `hermes` call; its argument is `code`."
    )
    parallel_calls: bool = Field(
        default=False,
        description="`hermes`: a turn ends where the policy ends it and may hold several calls; false: it ends with "
        "its first call.",
    )
    max_turns: int = Field(default=8, ge=1, description="Turns of the policy; an episode that wants more is truncated.")
    max_calls: int = Field(default=16, ge=1, description="Calls of an episode; one that wants more is truncated.")
    max_observation_tokens: int = Field(
        default=1024,
        ge=8,
        description="Longest result shown to the policy, tokens; of a longer one both ends are kept.",
    )
    episode_seconds: float = Field(
        default=600.0, gt=0, description="Wall-clock time of an episode; one that takes longer counts as failed."
    )
    tool_seconds: float = Field(
        default=20.0, gt=0, description="Wall-clock limit of a call, seconds; `sandbox.wall_seconds` if that is less."
    )
    keep_state: bool = Field(
        default=False, description="Calls of an episode share one state, like the cells of a notebook."
    )
    echo: bool = Field(default=True, description="Show the value of a call's last expression, as a notebook does.")
    call_errors: Literal["observe", "end"] = Field(
        default="observe",
        description="A call that cannot be read (bad JSON, an unknown tool): show the policy the error, or end the "
        "episode there.",
    )
    tool_failures: Literal["mask", "observe"] = Field(
        default="mask",
        description="The tool fails, not the code: the trajectory counts as failed and carries no loss, or the policy "
        "sees an error and goes on.",
    )
    final_answer: str = Field(
        default="",
        description="Regular expression of what a final answer holds, e.g. `\\\\boxed`; a last turn without it is "
        "void. Empty: any text is an answer.",
    )
    void_turns: Literal["train", "mask"] = Field(
        default="train",
        description="Trajectories with a void turn, neither a call nor a final answer in it: learned from, or left out "
        "(SimpleTIR).",
    )

    @model_validator(mode="after")
    def _fits(self) -> EnvConfig:
        try:
            re.compile(self.final_answer)
        except (re.error, OverflowError, RecursionError) as e:
            why = str(e).replace("\n", " ")
            raise ValueError(f"final_answer = {self.final_answer!r:.200} is no regular expression: {why}") from e
        if self.parallel_calls and self.parser != "hermes":
            raise ValueError(f'parallel_calls is for parser = "hermes", not {self.parser!r}: take it out')
        # Defaults may be written: a run's folder holds every key.
        defaults = {key: field.get_default() for key, field in type(self).model_fields.items()}
        unused = [key for key in sorted(self.model_fields_set - {"name"}) if getattr(self, key) != defaults[key]]
        if self.name == "single_turn" and unused:
            raise ValueError(f'{unused[0]} is not used by name = "single_turn"; set name = "tool_use"')
        return self
