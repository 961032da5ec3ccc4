"""What an environment is. The token stream is the truth: sampled ids are kept as sampled, and an observation is
encoded once, by the environment, and never re-rendered with the text before it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from stare_megatron.config import Section
from stare_megatron.config.env import EnvFacts
from stare_megatron.sandbox.client import SandboxClient
from stare_megatron.types import Completion, Prompt, Status, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How an environment may end an episode. The other statuses are the reward's and the run's to give.
ENDS = frozenset({Status.COMPLETED, Status.TRUNCATED, Status.FAILED, Status.INEXACT})
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class End:
    """The episode is over. `note` says why, where that is not plain from the status.

    Example:
        End(Status.TRUNCATED, "8 turns")
    """

    status: Status
    note: str = ""


class EnvError(Exception):
    """The environment failed this episode (a sandbox died, a tool timed out): the trajectory becomes FAILED."""


class Env(Protocol):
    """One episode's environment; single use."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings at which the policy's turn ends, beside the end-of-sequence token; they stay in it."""
        ...

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What it made of the actions so far; nothing in an environment without tools."""
        ...

    async def reset(self) -> npt.NDArray[np.int32]:
        """The prompt's tokens, int32 [n].

        Raises:
            EnvError: the episode cannot begin.
        """
        ...

    async def step(self, action: Completion) -> npt.NDArray[np.int32] | End:
        """Answer what the policy just wrote: the observation's tokens, int32 [n], or that the episode is over.

        No tokens: the turn was stopped before its end, and the policy writes on.

        Not called after a completion that ran out of tokens or failed.

        Raises:
            EnvError: the episode cannot go on.
        """
        ...

    async def close(self) -> None:
        """Free what the episode holds; called once, however it ended."""
        ...


MakeEnv = Callable[[Prompt], Env]


@dataclass(frozen=True)
class EnvContext(Generic[S]):
    """What the environments of a run are made with. `box`: an open sandbox, None where the kind needs none; `clock`:
    seconds, to measure by how long an episode has taken: it stands while the engine sleeps."""

    settings: S
    tokenizer: PreTrainedTokenizerBase
    box: SandboxClient | None = None
    clock: Callable[[], float] = time.monotonic


def nothing_to_check(context: EnvContext[Any]) -> None:
    """Of an environment that works with every tokenizer."""


@dataclass(frozen=True, kw_only=True)
class EnvKind(EnvFacts):
    """What `env.name` names. `make(prompt, context)`: the environment of one episode. `statuses`: how its `End`s may
    end an episode. `check(context)`, without a box, raises UserError before anything is started.

    Example:
        EnvKind(make=Guess, settings=GuessSettings, statuses=frozenset({Status.COMPLETED, Status.TRUNCATED}))
    """

    make: Callable[[Prompt, EnvContext[Any]], Env]
    statuses: frozenset[Status] = frozenset({Status.COMPLETED, Status.TRUNCATED})
    check: Callable[[EnvContext[Any]], None] = nothing_to_check

    def __post_init__(self) -> None:
        super().__post_init__()
        if strange := set(self.statuses) - ENDS:
            names = ", ".join(sorted(str(status) for status in strange))
            raise TypeError(f"statuses has {names}; an environment ends an episode with one of {_names(ENDS)}")
        if self.session_key and self.session_key not in self.settings.model_fields:
            raise TypeError(f"session_key = {self.session_key!r} is none of the settings")
        try:
            inspect.signature(self.make).bind(None, None)
        except (TypeError, ValueError) as e:
            raise TypeError(f"make = {self.make!r} cannot be called as make(prompt, context): {e}") from e


def _names(statuses: frozenset[Status]) -> str:
    return ", ".join(sorted(status.name for status in statuses))
