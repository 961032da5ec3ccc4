"""DAPO (arXiv 2503.14476, equations 8 to 13): clip-higher, token mean, and a reward that falls near the length limit.

loss: GRPO's with clip_high > clip_low, reduced by "token-mean"
reward: minus overlong_penalty * min(1, (n - (L - B)) / B) for n > L - B tokens; L = response_tokens,
B = overlong_share L

The shaping enters the advantage only: dynamic sampling, which is `[rollout]`'s, goes by the reward before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from stare_megatron.algo.advantages import Outcome, group_relative
from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.grpo import grpo_loss
from stare_megatron.config import AlgorithmConfig


def shaped_reward(outcome: Outcome, config: AlgorithmConfig) -> float:
    """The reward less the punishment of an overlong response."""
    buffer = config.dapo.overlong_share * config.response_tokens
    over = outcome.num_action_tokens - (config.response_tokens - buffer)
    if buffer == 0 or over <= 0:
        return outcome.reward
    return outcome.reward - config.dapo.overlong_penalty * min(over / buffer, 1.0)


def _advantage(outcomes: Sequence[Outcome], config: AlgorithmConfig) -> tuple[float, ...]:
    return group_relative([shaped_reward(o, config) for o in outcomes], normalize_std=config.normalize_std)


ALGORITHM = Algorithm(grpo_loss, advantage=_advantage)
