"""One prompt, one response."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stare_megatron.types import Completion, Prompt


class SingleTurn:
    """The episode is over when the policy stops."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt

    async def reset(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._prompt.token_ids, np.int32)

    async def step(self, action: Completion) -> None:
        return None

    async def close(self) -> None:
        return None
