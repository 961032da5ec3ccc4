"""Second chances: a wrong answer is sent back with the question, and the policy tries again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stare_megatron.config import Section
from stare_megatron.envs import End, EnvContext, EnvKind
from stare_megatron.types import Call, Completion, Prompt, Status, Turn


class Settings(Section):
    """Keys of `[env]` beside `name`."""

    attempts: int = Field(default=2, ge=1, description="Attempts at a prompt.")
    again: str = Field(default="-", min_length=1, description="Shown after a wrong attempt, before the question.")


class SecondChance:
    """One episode."""

    def __init__(self, prompt: Prompt, context: EnvContext[Settings]) -> None:
        self._prompt = prompt
        self._settings = context.settings
        self._tokenizer = context.tokenizer
        self._turns: list[Turn] = []

    @property
    def stop(self) -> tuple[str, ...]:
        return ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return tuple(self._turns)

    async def reset(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._prompt.token_ids, np.int32)

    async def step(self, action: Completion) -> npt.NDArray[np.int32] | End:
        text = str(self._tokenizer.decode(action.token_ids.tolist(), skip_special_tokens=True))
        right = text.split()[-1:] == [self._prompt.answer]
        self._turns.append(Turn((Call("check", text, "ok" if right else "wrong", seconds=0.0),), void=False))
        if right:
            return End(Status.COMPLETED)
        if len(self._turns) == self._settings.attempts:
            return End(Status.TRUNCATED, f"{self._settings.attempts} attempts")
        shown = f"{self._settings.again} {self._prompt.text}"
        return np.asarray(self._tokenizer.encode(shown, add_special_tokens=False), np.int32)

    async def close(self) -> None:
        return None


ENV = EnvKind(make=SecondChance, settings=Settings, statuses=frozenset({Status.COMPLETED, Status.TRUNCATED}))
