"""Settings of the reward: `[reward]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from stare_megatron.config.base import Free, Section, Text, compiled
from stare_megatron.config.registry import OpenTable, is_address
from stare_megatron.config.run import NAME


class WorkerConfig(Section):
    """Settings of the rewards that grade in processes of their own: `math` and `reasoning_gym`."""

    timeout: float = Field(
        default=10.0,
        gt=0,
        description="`math`, `reasoning_gym`: seconds one answer may take to grade; then it counts as not graded and "
        "carries no loss (`math`), or as wrong (`reasoning_gym`).",
    )
    processes: Free[int] = Field(default=2, ge=1, description="The same: grading processes of each engine.")
    memory_mb: Free[int] = Field(
        default=1024,
        ge=256,
        description="The same: memory of a grading process, MB; an answer that takes more counts as one that takes "
        "too long.",
    )


class FormatConfig(Section):
    """Settings of `format`: one demand at least."""

    tags: list[str] = Field(
        default_factory=list,
        description='`format`: the response is these elements in this order and nothing else, e.g. `["think", '
        '"answer"]` for `<think>...</think><answer>...</answer>`; none of them empty.',
    )
    pattern: str = Field(
        default="",
        description="`format`: a regular expression that the whole response matches (`.` is any character, also the "
        "end of a line); empty: any.",
    )
    boxed: bool = Field(default=False, description="`format`: the response holds a complete, non-empty `\\boxed{...}`.")
    prefix: str = Field(
        default="",
        description="`format`: what the prompt ends with and the response goes on from, e.g. `<think>` where the chat "
        "template writes it.",
    )

    @model_validator(mode="after")
    def _demands(self) -> FormatConfig:
        compiled("pattern", self.pattern)
        if not (self.tags or self.pattern or self.boxed):
            raise ValueError("a format without a demand: set one of tags, pattern and boxed")
        if strange := next((tag for tag in self.tags if not re.fullmatch(r"[A-Za-z][\w-]*", tag)), None):
            raise ValueError(f'tags holds {strange!r}; want names without brackets, e.g. "think"')
        return self


class LengthConfig(Section):
    """Settings of `length`."""

    limit: int = Field(ge=1, description="`length`: action tokens from which a response gets the full punishment, -1.")
    buffer: int = Field(
        ge=0,
        description="`length`: tokens before that over which the punishment grows from 0; 0: it comes at once.",
    )

    @model_validator(mode="after")
    def _within(self) -> LengthConfig:
        if self.buffer > self.limit:
            raise ValueError(f"buffer = {self.buffer} is more than limit = {self.limit}")
        return self


class CodeConfig(Section):
    """Settings of `code`."""

    tests_key: Text = Field(default="tests", description="`code`: column with a problem's tests, docs/rewards.md.")
    test_seconds: float = Field(
        default=6.0,
        gt=0,
        description="`code`: seconds a test may take; `sandbox.wall_seconds` and `sandbox.cpu_seconds` if those are "
        "less.",
    )
    tests_score: Literal["all", "fraction"] = Field(
        default="all",
        description="`code`: 1 for passing all tests, the first failure ends them; or the share of the tests passed.",
    )
    max_tests: int = Field(
        default=0, ge=0, description="`code`: tests of a problem at most, those with the longest input; 0: all."
    )
    tolerance: float = Field(
        default=1e-6,
        ge=0,
        lt=1,
        description="`code`: absolute or relative error of a number that is wanted with a decimal point.",
    )


class PartConfig(OpenTable):
    """One part of a sum: a reward with its own settings beside these keys."""

    registry: ClassVar[str] = "stare_megatron.rewards:PARTS"

    name: Text = Field(
        description="The part's reward, as `reward.name`, but no sum. Its settings stand beside it, as those of a "
        "reward do in `[reward]`."
    )
    weight: float = Field(
        default=1.0,
        ge=-1e6,
        le=1e6,
        description="What its reward is multiplied by; 0: it is only reported.",
    )
    label: str = Field(
        default="",
        max_length=100,
        pattern=rf"^$|{NAME}",
        description="Its name in metrics and notes; empty: that of the reward (of the object, for your own).",
    )

    @classmethod
    def sections(cls, tree: Mapping[str, Any] | None) -> list[type[Section]]:
        """None: the keys of the parts' rewards are listed once, under `[reward]`."""
        return []

    @property
    def called(self) -> str:
        """Its label, given or not."""
        return self.label or (re.split("[:.]", self.name)[-1] if is_address(self.name) else self.name)


class SumConfig(Section):
    """Settings of `sum`."""

    parts: list[PartConfig] = Field(
        min_length=1, description="`sum`: the rewards that are added, a table `[[reward.parts]]` each."
    )
    correct: str = Field(
        default="",
        description="`sum`: label of the part that says whether a response is correct; empty: the first.",
    )

    @model_validator(mode="after")
    def _labels(self) -> SumConfig:
        labels = [part.called for part in self.parts]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two parts are called {twice!r}; give one a label of its own")
        if self.correct and self.correct not in labels:
            raise ValueError(f"correct = {self.correct!r} is the label of no part; they are {', '.join(labels)}")
        if not any(part.weight for part in self.parts):
            raise ValueError("every part has the weight 0: nothing would be learned")
        return self


class RewardConfig(OpenTable):
    registry: ClassVar[str] = "stare_megatron.rewards:REWARDS"

    name: Text = Field(
        description="Reward: a name from the registry, e.g. `math`, `code`, `sum`, or your own, "
        "`package.module:object` or `path/to/file.py:object`, docs/adding_a_reward.md. The other keys are its settings."
    )
