"""What the trainer ranks tell the driver of a step: before its update, and after."""

from __future__ import annotations

from dataclasses import dataclass

from stare_megatron.types import ScoreSummary, UpdateStats


@dataclass(frozen=True)
class EntropyReading:
    """What the gate is decided by, equal on every rank. `num_action_tokens`: of the update batch; `entropy`: mean over
    them, nats, of the policy about to be updated: measured by the scoring pass, or, with `trainer.scoring = "rollout"`,
    estimated by their mean surprisal under the engines.

    Example:
        EntropyReading(num_action_tokens=4096, entropy=0.31)
    """

    num_action_tokens: int
    entropy: float


@dataclass(frozen=True)
class StepStats:
    """What an update batch was found to be, under the policy that its first optimizer step changed, and what each of
    its steps did."""

    scores: ScoreSummary
    updates: tuple[UpdateStats, ...]
