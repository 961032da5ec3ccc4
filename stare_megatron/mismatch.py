"""How far trainer and engines disagree about the sampled tokens: a part of `types.ScoreSummary`."""

from __future__ import annotations

from dataclasses import dataclass


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
