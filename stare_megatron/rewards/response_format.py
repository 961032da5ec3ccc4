"""The form of a response: tags in order, a regular expression, an answer in a box."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stare_megatron.config.reward import FormatConfig
from stare_megatron.data.boxed import last_boxed
from stare_megatron.data.rows import is_blank
from stare_megatron.rewards.base import RewardError, RewardKind, response_text
from stare_megatron.rewards.workers import WorkerError, WorkerLimits, WorkerPool
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A regular expression may take for ever on a text made for it, and cannot be interrupted.
_LIMITS = WorkerLimits(seconds=5.0, memory=512 << 20)


class FormatReward:
    """1 if the response has every form that the settings ask for, else 0; special tokens count as text, but for a final
    end-of-sequence token."""

    def __init__(self, config: FormatConfig) -> None:
        self._config = config
        self._pool = WorkerPool("stare_megatron.rewards.format_worker", 1, _LIMITS)

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Raises:
        RewardError: the regular expression takes too long on this response.
        """
        text = self._config.prefix + response_text(trajectory, tokenizer, skip_special_tokens=False)
        fault = tags_fault(self._config.tags, text) if self._config.tags else ""
        if not fault and self._config.boxed and not last_boxed(text):
            fault = "no answer in a box"
        if not fault and self._config.pattern and not await self._matches(text):
            fault = "does not match the pattern"
        return Score(float(not fault), not fault, fault)

    async def _matches(self, text: str) -> bool:
        try:
            return bool((await self._pool.call({"pattern": self._config.pattern, "text": text}))["matches"])
        except WorkerError as e:
            raise RewardError(f"reward pattern {self._config.pattern!r:.60}: {e}") from e

    async def close(self) -> None:
        """End the worker process; it also ends with the process that made it."""
        await self._pool.close()


def tags_fault(tags: list[str], text: str) -> str:
    """Why the text is not these elements in order, each once and not blank, with white space alone around them; "" if
    it is. In linear time.

    Example:
        tags_fault(["think", "answer"], "<think>3 + 4</think> <answer>7</answer>") == ""
    """
    found = list(re.finditer(f"<(/?)({'|'.join(map(re.escape, tags))})>", text))
    wanted = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if [match[0] for match in found] != wanted:
        return f"want {''.join(wanted)}, found {''.join(match[0] for match in found[:8])!r}"
    ends = [0, *(match.end() for match in found)]
    begins = [*(match.start() for match in found), len(text)]
    for index, (begin, end) in enumerate(zip(ends, begins, strict=True)):
        blank = is_blank(text[begin:end])
        if index % 2 and blank:
            return f"<{tags[index // 2]}> is empty"
        if not index % 2 and not blank:
            return f"text outside the tags: {text[begin:end].strip()[:40]!r}"
    return ""


REWARD = RewardKind(make=FormatReward, settings=FormatConfig)
