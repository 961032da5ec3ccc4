"""One prompt, one response."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stare_megatron.envs.base import End, EnvKind
from stare_megatron.types import Completion, Prompt, Status, Turn


class SingleTurn:
    """The episode is over when the policy stops."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt

    @property
    def stop(self) -> tuple[str, ...]:
        return ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return ()

    async def reset(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._prompt.token_ids, np.int32)

    async def step(self, action: Completion) -> End:
        return End(Status.COMPLETED)

    async def close(self) -> None:
        return None


ENV = EnvKind(make=lambda prompt, context: SingleTurn(prompt), statuses=frozenset({Status.COMPLETED}))
