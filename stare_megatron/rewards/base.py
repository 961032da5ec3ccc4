"""What a reward is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stare_megatron.config.registry import Kind
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.data.tokenizer import ends_a_sequence
from stare_megatron.sandbox.client import SandboxClient
from stare_megatron.types import Prompt, Score, SpanKind, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RewardError(Exception):
    """This trajectory could not be graded (a time-out, a dead worker): it becomes UNGRADED, with a note."""


class Reward(Protocol):
    """Scores one trajectory. An instance belongs to one event loop."""

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        """The score of a trajectory that is not FAILED.

        Raises:
            RewardError: it cannot be graded. Any other exception is a bug and ends the run.
        """
        ...


def nothing_to_check(prompt: Prompt) -> None:
    """Of a reward that grades every prompt."""


@dataclass(frozen=True)
class RewardContext:
    """What the rewards of a run are made with. `box`: an open sandbox, None where no code is run; `sandbox`: its
    settings."""

    settings: Any
    box: SandboxClient | None = None
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)


@dataclass(frozen=True, kw_only=True)
class RewardKind(Kind):
    """What `reward.name` names. `make(settings)`: a new reward; `settings` is an instance of the class of that name.
    With `needs_sandbox` it is `make(context)`, of a `RewardContext` with an open box. `check(prompt)` raises
    ValueError for a prompt it cannot grade; it is asked about all before anything is started.

    Example:
        RewardKind(make=Grader, settings=GraderSettings, columns=("tests",))
    """

    make: Callable[[Any], Reward]
    check: Callable[[Prompt], None] = nothing_to_check
    needs_sandbox: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.make):
            raise TypeError(f"make = {self.make!r} cannot be called; want a function of the settings")

    # What a kind whose settings decide it says otherwise.

    def runs_code(self, settings: Any) -> bool:
        """Whether a reward of these settings runs code that the policy wrote."""
        return self.needs_sandbox

    def build(self, context: RewardContext) -> Reward:
        """A new reward."""
        return self.make(context if self.needs_sandbox else context.settings)

    def checker(self, context: RewardContext) -> Callable[[Prompt], None]:
        """`check` for these settings; `nothing_to_check` where every prompt will do. There is no box yet.

        Raises:
            UserError: the reward cannot work here at all.
        """
        return self.check


def response_text(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> str:
    """What the policy wrote, decoded: all action tokens but a final end-of-sequence token."""
    ids = [span.token_ids for span in trajectory.spans if span.kind is SpanKind.ACTION]
    tokens = np.concatenate(ids).tolist() if ids else []
    if ends_a_sequence(tokens, tokenizer):
        tokens.pop()
    return str(tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))
