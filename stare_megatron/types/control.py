"""What the entropy controller decides for a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """The gate's decision for one step. Weights are 1 everywhere when `gate_on` is False.

    `weight_pos` (W) multiplies the loss of L+, `weight_neg` (M) that of L- (variant C2); `entropy` is what was
    observed, `target` what is wanted at this step, nats. `entropy_coefficient`: factor of an entropy bonus, loss per
    nat. `gain`: measured by expected change of entropy, as a weight that sets itself has learned it; 0: not learned.

    Example:
        Control(gate_on=True, weight_pos=1.1, weight_neg=0.9, entropy=0.21, target=0.3)
    """

    gate_on: bool
    weight_pos: float
    weight_neg: float
    entropy: float
    target: float
    entropy_coefficient: float = 0.0
    gain: float = 0.0
