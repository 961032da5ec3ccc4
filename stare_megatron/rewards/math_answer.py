"""Mathematical answers by math-verify, in worker processes: sympy can take minutes or memory without end, and
math-verify's own time-outs are signals, which work on a main thread only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stare_megatron.rewards.base import RewardError, response_text
from stare_megatron.rewards.workers import WorkerError, WorkerPool
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORKERS = 2
_TIMEOUT = 10.0  # seconds; the worker gives up by itself after 2 x 3
_TAIL = 4000  # characters in which an answer outside \boxed{} is looked for


class MathReward:
    """1 if the last `\\boxed{...}` of the response (without one: the last answer math-verify finds in it) is
    mathematically equal to the reference answer, else 0."""

    def __init__(self) -> None:
        self._pool = WorkerPool("stare_megatron.rewards.math_worker", _WORKERS, _TIMEOUT)

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        text = response_text(trajectory, tokenizer, skip_special_tokens=True)
        boxed = last_boxed(text)
        if boxed == "":
            return Score(0.0, False, "empty \\boxed{}")
        response = text[-_TAIL:] if boxed is None else f"\\boxed{{{boxed}}}"
        try:
            verdict = await self._pool.call({"answer": prompt.answer, "response": response})
        except WorkerError as e:
            raise RewardError(str(e)) from e
        right = bool(verdict["correct"])
        return Score(float(right), right, str(verdict["note"]))

    async def close(self) -> None:
        """End the worker processes; they also end with the process that made them."""
        await self._pool.close()


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` with matched braces, stripped; None if there is none."""
    begin = text.rfind("\\boxed{")
    while begin >= 0:
        depth = 0
        for end in range(begin + len("\\boxed"), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[begin + len("\\boxed{") : end].strip()
        begin = text.rfind("\\boxed{", 0, begin)
    return None
