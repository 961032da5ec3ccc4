"""W-REINFORCE (arXiv 2506.01347, equation 9): REINFORCE on signed rewards with the positive samples scaled down.

A = lambda where the reward is positive, -1 elsewhere: no group mean, no standard deviation
loss = GRPO's with A - entropy_coefficient * H; at the scoring policy (r = 1) the first term is the REINFORCE gradient

lambda = 1 is REINFORCE, lambda = 0 learns from negative samples only. A group whose rewards are all equal teaches here,
so `rollout.dynamic_sampling = false` is the paper's setting.
"""

from __future__ import annotations

from collections.abc import Sequence

from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.entropy_bonus import with_bonus
from stare_megatron.algo.losses.grpo import grpo_loss
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.config import AlgorithmConfig


def w_reinforce_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    return with_bonus(grpo_loss(tokens, config), tokens, config.w_reinforce.entropy_coefficient)


def _advantage(outcomes: Sequence[Outcome], config: AlgorithmConfig) -> tuple[float, ...]:
    return tuple(config.w_reinforce.positive_weight if o.reward > 0 else -1.0 for o in outcomes)


ALGORITHM = Algorithm(w_reinforce_loss, advantage=_advantage, entropy_gradient=True)
