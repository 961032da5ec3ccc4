"""What the trainer ranks tell the driver of a step, before its update and after, and what it remembers of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stare_megatron.types.control import Control


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
class Mismatch:
    """Over the action tokens of an update batch, x = trainer log-prob - engine log-prob of each, at temperature 1.

    `mean`, `max`: |x|, nats. `kl`: mean of r - 1 - log r with r = exp(x), an estimate of KL(engine || trainer), nats.
    `ratio_max`: largest r. `ess`: effective sample size under the weights r, as a share of the tokens:
    (sum r)^2 / (n sum r^2). `sequence_ratio_max`, `sequence_ess`: the same two of whole trajectories, whose ratio is
    the product of their tokens' r.
    """

    mean: float
    max: float
    kl: float
    ratio_max: float
    ess: float
    sequence_ratio_max: float
    sequence_ess: float


@dataclass(frozen=True)
class ScoreSummary:
    """Sums of `Scores` over the whole update batch, equal on every rank and for every layout.

    `entropy`: mean over action tokens, nats. `surprisal`: mean of -logprob, nats; `rollout_surprisal`: the same of the
    engine's.
    """

    num_action_tokens: int
    entropy: float
    surprisal: float
    rollout_surprisal: float
    mismatch: Mismatch


@dataclass(frozen=True)
class Dynamics:
    """Sums over the action tokens of one optimizer step, over all ranks: see `algo.dynamics`.

    Tuples are by quadrant: A > 0 and likely (surprisal below the critical one), A > 0 and unlikely, A < 0 and likely,
    A < 0 and unlikely; tokens with A = 0 are in none. `tokens`: how many; `advantage`: |A|; `change`: predicted change
    of entropy -w A S, nats a unit step. `unweighted_change`: -A S over all quadrants; `critical_surprisal`: nats.
    `intersection`, `union`: tokens in both of, and in one of, the chosen set and the exact-sensitivity set.
    `non_finite`: terms left out of the sums. `num_tokens`: action tokens.
    """

    num_tokens: int
    tokens: tuple[int, ...]
    advantage: tuple[float, ...]
    change: tuple[float, ...]
    unweighted_change: float
    critical_surprisal: float
    intersection: int
    union: int
    non_finite: int


@dataclass(frozen=True)
class UpdateStats:
    """One optimizer step, equal on every rank.

    `loss`: the objective; `grad_norm`: before clipping; `learning_rate`; `clip_fraction`: share of action tokens whose
    ratio was clipped; `ratio_max`; `kl`: mean of r - 1 - log r against the scoring policy, nats;
    `selected_pos`, `selected_neg`: tokens in L+ and L-; `num_pos`, `num_neg`: tokens in T+ and T-.
    `correction_mean`: mean rollout-correction factor; `correction_bounded`: share of tokens truncated or masked by it.
    `dynamics`: what the step is expected to do to the entropy.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    clip_fraction: float
    ratio_max: float
    kl: float
    selected_pos: int
    selected_neg: int
    num_pos: int
    num_neg: int
    correction_mean: float
    correction_bounded: float
    dynamics: Dynamics


@dataclass(frozen=True)
class StepStats:
    """What an update batch was found to be, under the policy that its first optimizer step changed, and what each of
    its steps did."""

    scores: ScoreSummary
    updates: tuple[UpdateStats, ...]


@dataclass(frozen=True)
class Observed:
    """A step's mean entropy, nats a token, under the policy before its update, and the change its update predicted,
    nats a token and unit step."""

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
