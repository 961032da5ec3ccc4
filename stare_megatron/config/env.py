"""Settings of the environment that the policy acts in: `[env]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from stare_megatron.config.base import Section, Text, compiled
from stare_megatron.config.registry import Kind, OpenTable


@dataclass(frozen=True, kw_only=True)
class EnvFacts(Kind):
    """`needs_sandbox`: it runs code that the policy writes. `session_key`: the setting (true or false) under which it
    keeps state across calls, which a server at `sandbox.url` cannot; empty: it never does."""

    needs_sandbox: bool = False
    session_key: str = ""


class ToolUseConfig(Section):
    """Settings of `tool_use`."""

    parser: Literal["hermes", "retool", "fenced"] = Field(
        default="hermes",
        description="How a call is written: `<tool_call>` JSON between chat turns, `<code>` ... `<interpreter>`, or a "
        "fenced block of Python.",
    )
    tool: Text = Field(default="python", description="Name of the tool in a `hermes` call; its argument is `code`.")
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
        default=600.0,
        gt=0,
        description="Wall-clock time of an episode while its engine is awake; one that takes longer counts as failed.",
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

    @model_validator(mode="after")
    def _fits(self) -> ToolUseConfig:
        compiled("final_answer", self.final_answer)
        if self.parallel_calls and self.parser != "hermes":
            raise ValueError(f'parallel_calls is for parser = "hermes", not {self.parser!r}: take it out')
        if self.tool != "python" and self.parser != "hermes":
            raise ValueError(f'tool = {self.tool!r} is for parser = "hermes", not {self.parser!r}: take it out')
        return self


class EnvConfig(OpenTable):
    registry: ClassVar[str] = "stare_megatron.envs:ENVS"

    name: Text = Field(
        default="single_turn",
        description="`single_turn`: one response a prompt; `tool_use`: code the policy writes is run and it goes on, "
        "docs/tool_use.md; or your own, `package.module:object` or `path/to/file.py:object`, "
        "docs/adding_an_environment.md. The other keys but `void_turns` are its settings; those listed here are for "
        "`tool_use`.",
    )
    void_turns: Literal["train", "mask"] = Field(
        default="train",
        description="Trajectories with a void turn, neither a call nor a final answer in it: learned from, or left out "
        "(SimpleTIR).",
    )

    @property
    def kind(self) -> EnvFacts:
        """What the configuration knows of the environment."""
        return self.kinds()[self.name]
