"""Rewards from plain functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stare_megatron.config import Section
from stare_megatron.rewards.base import RewardKind, response_text
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = "`def grade(prompt, text) -> float` or `async def reward(prompt, trajectory, tokenizer) -> Score`"


class TextReward:
    """`grade(prompt, text)` of what the policy wrote, as text without special tokens. A number of at least 1 counts as
    correct; to say otherwise it returns a `Score`."""

    def __init__(self, grade: Callable[[Prompt, str], object]) -> None:
        self._grade = grade

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Raises: TypeError: what `grade` returned is neither a number nor a `Score`. ValueError: NaN or infinity."""
        said = self._grade(prompt, response_text(trajectory, tokenizer, skip_special_tokens=True))
        if isinstance(said, Score):
            return said
        if not isinstance(said, bool | int | float):
            raise TypeError(f"the reward returned {said!r} for prompt {prompt.id}; want a number or a Score")
        return Score(float(said), said >= 1, "")


def text_reward(
    grade: Callable[..., object], settings: type[Section] = Section, columns: tuple[str, ...] = ()
) -> RewardKind:
    """`grade(prompt, text)`, or with `settings` `grade(prompt, text, settings)`, as a reward. It is called in the
    engine's event loop and must be quick; what takes long is a reward with `async`.

    Raises:
        TypeError: it does not take that many arguments, or is no plain function.
    """
    own = settings is not Section
    if not _takes(grade, 3 if own else 2) or inspect.iscoroutinefunction(grade):
        wants = "`def grade(prompt, text, settings) -> float`" if own else _FORMS
        raise TypeError(f"is {_described(grade)}; want {wants}")

    def make(made: Any) -> TextReward:
        return TextReward((lambda prompt, text: grade(prompt, text, made)) if own else grade)

    return RewardKind(make=make, settings=settings, columns=columns)


def from_object(found: object) -> RewardKind:
    """What a user's address names, if it is no `RewardKind`: a plain function.

    Raises:
        TypeError: it is none, or takes other arguments.
    """
    if isinstance(found, type) or not callable(found):
        cure = f"RewardKind(make={found.__name__})" if isinstance(found, type) else f"a RewardKind or {_FORMS}"
        raise TypeError(f"is {_described(found)}; want {cure}")
    if inspect.iscoroutinefunction(found):
        if not _takes(found, 3):
            raise TypeError(f"is {_described(found)}; want {_FORMS}")
        return RewardKind(make=lambda settings: found)
    return text_reward(found)


def _takes(function: Callable[..., object], count: int) -> bool:
    """Whether it can be called with `count` positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _described(found: object) -> str:
    if isinstance(found, type) or not callable(found):
        return f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
    word = "async def " if inspect.iscoroutinefunction(found) else "def "
    return f"`{word}{found.__name__}{inspect.signature(found)}`" if inspect.isfunction(found) else repr(found)
