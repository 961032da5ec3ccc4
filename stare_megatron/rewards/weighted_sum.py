"""A weighted sum of rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stare_megatron.config.reward import PartConfig, SumConfig
from stare_megatron.rewards.base import Reward, RewardContext, RewardError, RewardKind, nothing_to_check
from stare_megatron.types import Measured, Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SumReward:
    """The sum of weight x reward over the parts, which grade a trajectory at the same time.

    A part that cannot grade leaves the whole trajectory ungraded: with 0 in its place the sum would be another reward.
    One of weight 0 is only reported, and is left out where it cannot. Whether a response is correct is said by the
    part of `correct`. Each part's reward is measured as `reward/part/LABEL`, with what it measures itself.
    """

    def __init__(self, context: RewardContext) -> None:
        config: SumConfig = context.settings
        self._rewards = [part.kind.build(replace(context, settings=part.settings)) for part in config.parts]
        self._parts = config.parts
        self._verdict = config.correct or config.parts[0].called

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Raises:
        RewardError: a part that counts cannot be graded.
        """
        asked = [asyncio.ensure_future(_graded(reward(prompt, trajectory, tokenizer))) for reward in self._rewards]
        try:
            scores = await asyncio.gather(*asked)
        finally:  # a bug in one ends the others
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        graded: list[tuple[PartConfig, Score]] = []
        for part, score in zip(self._parts, scores, strict=True):
            if score.graded:
                graded.append((part, score))
            elif part.weight or part.called == self._verdict:
                raise RewardError(f"{part.called}: {score.note}")
        measured = [m for _, score in graded for m in score.measured]
        measured += [Measured(f"reward/part/{part.called}", score.reward) for part, score in graded]
        told = (f"{part.called} {s.reward:g}{f' ({s.note})' if s.note else ''}" for part, s in graded)
        return Score(
            reward=sum(part.weight * score.reward for part, score in graded),
            correct=next(score.correct for part, score in graded if part.called == self._verdict),
            note=", ".join(told),
            measured=tuple(measured),
        )


async def _graded(grading: Awaitable[Score]) -> Score:
    try:
        return await grading
    except RewardError as e:
        return Score(0.0, False, str(e), graded=False)


@dataclass(frozen=True, kw_only=True)
class SumKind(RewardKind):
    """What a sum needs is what its parts need."""

    make: Callable[[Any], Reward] = SumReward

    def columns_of(self, settings: SumConfig) -> tuple[str, ...]:
        """Of all parts."""
        return tuple(dict.fromkeys(c for part in settings.parts for c in part.kind.columns_of(part.settings)))

    def addresses_of(self, settings: SumConfig) -> Mapping[str, str]:
        """Of all parts, by label."""
        return {f"parts.{part.called}": part.name for part in settings.parts}

    def runs_code(self, settings: SumConfig) -> bool:
        """Whether a part does."""
        return any(part.kind.runs_code(part.settings) for part in settings.parts)

    def build(self, context: RewardContext) -> Reward:
        """With a reward for each part."""
        return SumReward(context)

    def checker(self, context: RewardContext) -> Callable[[Prompt], None]:
        """Those of the parts."""
        config: SumConfig = context.settings
        made = {p.called: p.kind.checker(replace(context, settings=p.settings)) for p in config.parts}
        checks = {label: check for label, check in made.items() if check is not nothing_to_check}

        def check(prompt: Prompt) -> None:
            for label, check_part in checks.items():
                try:
                    check_part(prompt)
                except ValueError as e:
                    raise ValueError(f"part {label!r}: {e}") from e

        return check if checks else nothing_to_check


REWARD = SumKind(settings=SumConfig)
