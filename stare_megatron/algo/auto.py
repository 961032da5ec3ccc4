"""A weight of STARE that sets itself: what the batch's own tokens need to hold the entropy at its target.

A step is expected to change the batch's mean entropy by g (D + (W - 1) D+ + (M - 1) D-): D what all tokens would do at
weight 1, D+ and D- the parts of it that L+ and L- make, for a unit step on the logits (`types.EntropyForces`; exact,
and known before the update). g, the gain, is what the real step makes of that: learning rate, optimizer, clipping,
tokens that share parameters. It is learned from what was measured after each step.

    wanted    d = ((H_tgt - H) / T + I) / (g + standard error of g)      T: time constant, steps
    strength  the u >= 0 with  D + u D+ + u / (1 + u) |D-| = d;          W = 1 + u,  M = 1 / (1 + u)
    integral  I <- clip(I + (H_tgt - H) / (8 T^2), +-H_tgt / T)          while u is not at a bound

Not in the paper. An uncertain gain counts as a large one, so that the first weights are small; u grows at most by half
a step. docs/algorithms/stare.md says what the gain absorbs and what it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from stare_megatron.types import EntropyForces

FORGET = 0.99  # of what was learned of the gain, a step: it remembers some hundred
_INTEGRAL = 8.0  # time constants by which the integral is slower than the proportional part
_GROWTH, _FIRST = 1.5, 0.25  # most that u grows by in a step, and what it may be from nothing
_LEAST_STEPS = 2


@dataclass(frozen=True)
class Gain:
    """What was expected and measured so far, and the last step's own: sums with forgetting of x^2, x y, y^2 and 1, x
    expected at gain 1, y measured, nats. `expected`: of the step that was taken from mean entropy `entropy`; `steps`
    taken; `integral`: I, nats a step; `strength`: u.

    `dataclasses.asdict` writes it, `Gain(**d)` reads it.
    """

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    count: float = 0.0
    entropy: float = 0.0
    expected: float = 0.0
    steps: int = 0
    integral: float = 0.0
    strength: float = 0.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, vars(self).values())) or self.steps < 0:
            raise ValueError(f"what is known of the gain must be finite, and of no negative number of steps: {self}")

    def learned(self, entropy: float) -> Gain:
        """With what the last step turned out to do."""
        if not self.steps:
            return self
        x, y = self.expected, entropy - self.entropy
        return replace(
            self,
            xx=FORGET * self.xx + x * x,
            xy=FORGET * self.xy + x * y,
            yy=FORGET * self.yy + y * y,
            count=FORGET * self.count + 1.0,
        )

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
    root = math.sqrt(half * half + raised * missing)
    return missing / (half + root) if half > 0 else (root - half) / raised


def observe(
    gain: Gain, entropy: float, target: float, forces: EntropyForces, *, time_constant: float, most: float, damped: bool
) -> Gain:
    """One step's strength u, 0 to `most`, in the new state. Entropies and forces in nats per action token."""
    gain = gain.learned(entropy)
    gap = target - entropy
    known, error = gain.estimate()
    integral, u = gain.integral, 0.0
    if known + error > 0.0:  # not before something was learned
        asked = strength((gap / time_constant + integral) / (known + error), forces, damped)
        u = min(asked, most, max(_GROWTH * gain.strength, _FIRST))
        if u == asked > 0.0 or (asked > u and gap < 0.0) or (asked == 0.0 and gap > 0.0):
            integral += gap / (_INTEGRAL * time_constant**2)
        bound = target / time_constant
        integral = min(max(integral, -bound), bound)
    expected = forces.all_tokens + u * forces.chosen_pos - (u / (1.0 + u) * forces.chosen_neg if damped else 0.0)
    return replace(gain, entropy=entropy, expected=expected, steps=gain.steps + 1, integral=integral, strength=u)
