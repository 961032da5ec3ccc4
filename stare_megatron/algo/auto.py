"""A weight of STARE that sets itself: what the batch's own tokens need to hold the entropy at its target.

A step is expected to change the batch's mean entropy by g (D + (W - 1) D+ + (M - 1) D-): D what all tokens would do at
weight 1, D+ and D- the parts of it that L+ and L- make, for a unit step on the logits (`types.EntropyForces`; exact,
and known before the update). g, the gain, is what the real step makes of that: learning rate, optimizer, clipping,
tokens that share parameters. It is learned from what was measured after each step.

A batch's mean entropy H is a noisy reading: it depends on which prompts and responses were drawn. The controller acts
on an estimate h of it, by a steady Kalman filter whose model is the expected change, with a drift b that no token
predicts:

    predicted  p = h + g x + b;   h <- p + 0.5 (H - p);   b <- clip(b + 0.03 (H - p), +-H_tgt / 5)
    wanted     d = ((H_tgt - h) / T - b) / (g + standard error of g)      T: time constant, steps
    strength   the u >= 0 with  D + u D+ + u / (1 + u) |D-| = d;          W = 1 + u,  M = 1 / (1 + u)

x is of the last step, as it was taken: b does not wind up while u is at a bound. Not in the paper. An uncertain gain
counts as a large one, so that the first weights are small; u grows at most by half of what it lately was.
docs/algorithms/stare.md says what the gain absorbs and what it does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stare_megatron.types import EntropyForces

FORGET = 0.99  # of what was learned of the gain, a step: it remembers some hundred
_TRUST, _LEARN = 0.5, 0.03  # of the difference between a reading and its prediction: what h and b take over
_DRIFT = 5.0  # steps in which a drift may at most amount to the target
_GROWTH, _FIRST = 1.5, 0.25  # most that u grows by in a step, and what it may be from nothing
_FADE = 0.95  # a step, of the largest u that its growth is measured by
_LEAST_STEPS = 2


@dataclass(frozen=True)
class Gain:
    """What was expected and measured so far, and the last step's own: sums with forgetting of x^2, x y, y^2 and 1, x
    expected at gain 1, y measured less h, nats. `entropy`: h, of the policy that the last step was taken from;
    `expected`: x of that step; `steps` taken; `drift`: b, nats a step; `strength`: u; `reached`: the largest u, fading.

    `dataclasses.asdict` writes it, `Gain.read` reads it.
    """

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    count: float = 0.0
    entropy: float = 0.0
    expected: float = 0.0
    steps: int = 0
    drift: float = 0.0
    strength: float = 0.0
    reached: float = 0.0

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> Gain:
        """What `asdict` wrote, or an earlier version of it, with an integral term where there is a drift now.

        Raises:
            TypeError, ValueError: it is something else.
        """
        if "integral" not in tree:
            return cls(**tree)
        rest = {key: value for key, value in tree.items() if key != "integral"}
        return cls(**rest, drift=-tree["integral"], reached=tree["strength"])

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, vars(self).values())) or self.steps < 0:
            raise ValueError(f"what is known of the gain must be finite, and of no negative number of steps: {self}")

    def learned(self, reading: float, most: float) -> Gain:
        """With what the last step turned out to do: the entropy's `reading` after it, nats; |drift| is at most `most`.

        The change is measured from h, not from the last reading: that one's noise is in x too, by u, and would look
        like gain.
        """
        if not self.steps:
            return replace(self, entropy=reading)
        x, y = self.expected, reading - self.entropy
        after = replace(
            self,
            xx=FORGET * self.xx + x * x,
            xy=FORGET * self.xy + x * y,
            yy=FORGET * self.yy + y * y,
            count=FORGET * self.count + 1.0,
        )
        predicted = self.entropy + after.estimate()[0] * x + self.drift
        missed = reading - predicted
        drift = min(max(self.drift + _LEARN * missed, -most), most)
        return replace(after, entropy=predicted + _TRUST * missed, drift=drift)

    def estimate(self) -> tuple[float, float]:
        """The gain, at least 0, and its standard error; both 0 before there is anything to tell them by."""
        if self.count < _LEAST_STEPS or self.xx <= 0.0:
            return 0.0, 0.0
        gain = self.xy / self.xx
        variance = max(self.yy - gain * self.xy, 0.0) / (self.count - 1.0)
        return max(gain, 0.0), math.sqrt(variance / self.xx)


def strength(wanted: float, forces: EntropyForces, damped: bool) -> float:
    """The u >= 0 of which the weights W = 1 + u and, where L- is `damped`, M = 1 / (1 + u) give a unit step the change
    `wanted`; 0 where less than none would, infinite where none is enough.

    With E = |D-| and d less what all tokens do at weight 1:  u D+ + u E / (1 + u) = d, a quadratic in u.
    """
    missing = wanted - forces.all_tokens
    raised = max(forces.chosen_pos, 0.0)
    spared = max(-forces.chosen_neg, 0.0) if damped else 0.0
    if missing <= 0.0:
        return 0.0
    if raised == 0.0:
        return missing / (spared - missing) if spared > missing else math.inf
    half = (raised + spared - missing) / 2.0
    root = math.hypot(half, math.sqrt(raised) * math.sqrt(missing))  # products of small numbers would vanish
    return missing / (half + root) if half > 0 else (root - half) / raised


def observe(
    gain: Gain, reading: float, target: float, forces: EntropyForces, *, time_constant: float, most: float, damped: bool
) -> Gain:
    """One step's strength u, 0 to `most`, in the new state. The entropy's reading and the forces in nats a token."""
    gain = gain.learned(reading, target / _DRIFT)
    known, error = gain.estimate()
    u = 0.0
    if known + error > 0.0:  # not before something was learned
        wanted = ((target - gain.entropy) / time_constant - gain.drift) / (known + error)
        u = min(strength(wanted, forces, damped), most, max(_GROWTH * gain.reached, _FIRST))
    expected = forces.all_tokens + u * forces.chosen_pos - (u / (1.0 + u) * forces.chosen_neg if damped else 0.0)
    reached = max(u, _FADE * gain.reached)
    return replace(gain, expected=expected, steps=gain.steps + 1, strength=u, reached=reached)
