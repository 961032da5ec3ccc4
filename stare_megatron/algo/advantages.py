"""Advantage of each trajectory from the rewards of its whole group.

GRPO: arXiv 2402.03300, section 4.1.2; without the division by the standard deviation: Dr. GRPO, arXiv 2503.20783;
leave-one-out: RLOO, arXiv 2402.14740, equation 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

EPSILON = 1e-6  # added to the standard deviation


@dataclass(frozen=True)
class Outcome:
    """What an advantage may depend on: a trajectory's reward and how many tokens the policy wrote.

    Example:
        Outcome(reward=1.0, num_action_tokens=412)
    """

    reward: float
    num_action_tokens: int


def group_relative(rewards: Sequence[float], *, normalize_std: bool) -> tuple[float, ...]:
    """Reward minus the group's mean, divided by its (n - 1) standard deviation + 1e-6 when `normalize_std`.

    A group of one keeps its reward (mean 0, standard deviation 1). Equal rewards give exactly 0, so that rounding of
    the mean never makes a sign.
    """
    n = len(rewards)
    if n == 1:
        return (rewards[0] / (1.0 + EPSILON) if normalize_std else rewards[0],)
    if min(rewards) == max(rewards):
        return (0.0,) * n
    mean = math.fsum(rewards) / n
    centred = [r - mean for r in rewards]
    if not normalize_std:
        return tuple(centred)
    std = math.sqrt(math.fsum(c * c for c in centred) / (n - 1))
    return tuple(c / (std + EPSILON) for c in centred)
