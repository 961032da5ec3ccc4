"""What an environment is. The token stream is the truth: sampled ids are kept as sampled, and an observation is
encoded once, by the environment, and never re-rendered with the text before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stare_megatron.types import Completion, Prompt, Status, Turn


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
