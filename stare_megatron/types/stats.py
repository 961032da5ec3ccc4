"""What the trainer ranks tell the driver of a step, before its update and after, and what it remembers of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stare_megatron.types.control import Control
from stare_megatron.types.measured import Measurements


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
class EntropyForces:
    """What a unit step on the logits is expected to change the update batch's mean entropy by, nats per action token,
    to first order (`algo.dynamics`), equal on every rank: `all_tokens` at weight 1; `chosen_pos` and `chosen_neg` of
    them the tokens of L+ and L- alone.

    Example:
        EntropyForces(all_tokens=-0.02, chosen_pos=0.004, chosen_neg=-0.003)
    """

    all_tokens: float
    chosen_pos: float
    chosen_neg: float


@dataclass(frozen=True)
class ForcedReading(EntropyReading):
    """With what the tokens are expected to do to the entropy, for a controller that weighs them by it."""

    forces: EntropyForces


# By the signs of advantage and entropy sensitivity (`algo.dynamics`), as in the metrics' names and in this order.
QUADRANTS = {
    "pos_likely": "A > 0, surprisal below the critical one (S > 0).",
    "pos_unlikely": "A > 0, above it (S < 0).",
    "neg_likely": "A < 0, below it.",
    "neg_unlikely": "A < 0, above it.",
}


@dataclass(frozen=True)
class ScoreSummary(Measurements):
    """Of the whole update batch under the policy about to be updated: equal on every rank and for every layout."""

    num_action_tokens: int


@dataclass(frozen=True)
class UpdateStats(Measurements):
    """One optimizer step, equal on every rank."""


@dataclass(frozen=True)
class StepStats:
    """What an update batch was found to be, under the policy that its first optimizer step changed, and what each of
    its steps did."""

    scores: ScoreSummary
    updates: tuple[UpdateStats, ...]


@dataclass(frozen=True)
class Observed:
    """A step's mean entropy, nats per token, under the policy before its update, and the change its update predicted,
    nats per token and unit step."""

    entropy: float
    predicted: float


@dataclass(frozen=True)
class GateDuty:
    """How many steps the run's record holds, and in how many of them the gate was open."""

    steps: int
    opened: int

    def after(self, control: Control) -> GateDuty:
        return GateDuty(self.steps + 1, self.opened + control.gate_on)


UNOBSERVED = Observed(math.nan, math.nan)  # before the first step
