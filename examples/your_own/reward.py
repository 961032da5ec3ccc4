"""Partial credit: the last number of the response, right or within the row's own tolerance."""

from __future__ import annotations

from pydantic import Field

from stare_megatron.config import Section
from stare_megatron.rewards import text_reward
from stare_megatron.types import Prompt, Score


class Settings(Section):
    """Keys of `[reward]` beside `name`."""

    partial: float = Field(default=0.3, ge=0, le=1, description="Reward of an answer within the row's tolerance.")


def grade(prompt: Prompt, text: str, settings: Settings) -> Score:
    words = text.split()
    if not words or not words[-1].isdecimal():
        return Score(0.0, False, "no number at the end")
    distance = abs(int(words[-1]) - int(prompt.answer))
    if distance == 0:
        return Score(1.0, True, "")
    near = distance <= int(str(prompt.extra["tolerance"]))
    return Score(settings.partial if near else 0.0, False, f"off by {distance}")


REWARD = text_reward(grade, Settings, columns=("tolerance",))
