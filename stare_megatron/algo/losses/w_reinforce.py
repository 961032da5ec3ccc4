"""W-REINFORCE (arXiv 2506.01347): REINFORCE on signed rewards with the positive samples scaled down.

A = lambda where the reward is positive, -1 elsewhere: no group mean, no standard deviation
loss = GRPO's with A; at the scoring policy (r = 1) that is the REINFORCE gradient

lambda = 1 is REINFORCE, lambda = 0 learns from negative samples only. A group whose rewards are all equal teaches here,
so `rollout.dynamic_sampling = false` is the paper's setting.
"""

from __future__ import annotations

from collections.abc import Sequence

from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.grpo import grpo_loss
from stare_megatron.config import AlgorithmConfig


def _advantage(outcomes: Sequence[Outcome], config: AlgorithmConfig) -> tuple[float, ...]:
    return tuple(config.w_reinforce.positive_weight if o.reward > 0 else -1.0 for o in outcomes)


ALGORITHM = Algorithm(grpo_loss, advantage=_advantage)
