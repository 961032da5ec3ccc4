"""The target-entropy gate and its adaptive schedule (arXiv 2606.19236), and two controllers that move the weights
without a jump: entropy in, `Control` out, once a step.

The state is a frozen value: the loop keeps it, the checkpoint holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stare_megatron.algo import auto
from stare_megatron.algo.auto import Gain
from stare_megatron.config import AlgorithmConfig, StareConfig
from stare_megatron.errors import RunError
from stare_megatron.types import Control, EntropyReading, ForcedReading


@dataclass(frozen=True)
class ControllerState:
    """Weights W and M, and the coefficient of an entropy bonus, after the last step.

    `steps`: steps observed; `integral`: the integral term of a proportional-integral controller, in units of W; `gain`:
    of a weight that sets itself. `dataclasses.asdict` writes it, `ControllerState.read` reads it.

    Example:
        ControllerState(weight_pos=1.11, weight_neg=0.89)
    """

    weight_pos: float
    weight_neg: float
    entropy_coefficient: float = 0.0
    steps: int = 0
    integral: float = 0.0
    gain: Gain = field(default_factory=Gain)

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> ControllerState:
        """What `asdict` wrote, or an earlier version of it without a gain, or with another.

        Raises:
            TypeError, ValueError: it is something else.
        """
        return cls(**{**tree, "gain": Gain.read(tree.get("gain", {}))})

    def __post_init__(self) -> None:
        numbers = (self.weight_pos, self.weight_neg, self.entropy_coefficient, self.integral)
        if not all(map(math.isfinite, numbers)) or self.steps < 0:
            raise ValueError(f"controller state must be finite, and of no negative number of steps: {self}")


def initial(config: AlgorithmConfig) -> ControllerState:
    """The state before the first step. The first gate is decided by the first batch, not assumed open."""
    return ControllerState(config.stare.weight_pos, config.stare.weight_neg)


def target_entropy(stare: StareConfig, steps: int) -> float:
    """H_tgt, nats, in force after `steps` steps: `target_entropy` at the first, `target_entropy_end` from the
    `target_steps`-th on; between them a straight line or half a cosine. `target_steps` is settled (not 0)."""
    if stare.target_schedule == "constant":
        return stare.target_entropy
    done = min(1.0, steps / max(1, stare.target_steps - 1))
    if stare.target_schedule == "cosine":
        done = (1.0 - math.cos(math.pi * done)) / 2.0
    return (1.0 - done) * stare.target_entropy + done * stare.target_entropy_end


def observe(
    config: AlgorithmConfig, state: ControllerState, reading: EntropyReading
) -> tuple[ControllerState, Control]:
    """The gate of this step from the batch's mean entropy H, nats, under the policy about to be updated.

    gate_on = H < H_tgt. Adaptive, with sign(0) = 0: W <- clip(W + alpha sign(H_tgt - H), 1, W_max),
    M <- clip(M - alpha sign(H_tgt - H), M_min, 1); the new values hold for this very step. Proportional: this step's
    weights are 1 + u (W - 1) and 1 + u (M - 1), u = min(1, (H_tgt - H) / (band H_tgt)), so that they do not jump at the
    target; W, M stay. Proportional-integral: see `_proportional_integral`; its gate is on where a weight is not 1, as
    is that of weights that set themselves (`algo.auto`).

    Raises:
        RunError: H is not finite.
    """
    stare, entropy = config.stare, reading.entropy
    if not math.isfinite(entropy):
        raise RunError(f"the update batch's mean entropy is {entropy}; the gate cannot be decided")
    target = target_entropy(stare, state.steps)
    gap = target - entropy
    state = replace(state, steps=state.steps + 1)
    if stare.weight == "auto":
        return _set_by_itself(stare, state, reading, target)
    if stare.controller == "proportional_integral":
        integral, weight_pos, weight_neg = _proportional_integral(stare, state.integral, gap)
        gate_on = (weight_pos, weight_neg) != (1.0, 1.0)
        return replace(state, integral=integral), Control(gate_on, weight_pos, weight_neg, entropy, target)
    if stare.adaptive:
        step = stare.alpha * ((gap > 0) - (gap < 0))
        state = replace(
            state,
            weight_pos=min(max(state.weight_pos + step, 1.0), stare.weight_pos_max),
            weight_neg=min(max(state.weight_neg - step, stare.weight_neg_min), 1.0),
        )
    gate_on = entropy < target
    weight_pos, weight_neg = state.weight_pos, state.weight_neg
    if stare.controller == "proportional" and gate_on:
        strength = min(1.0, gap / (stare.band * target))
        weight_pos, weight_neg = 1.0 + strength * (weight_pos - 1.0), 1.0 + strength * (weight_neg - 1.0)
    return state, Control(gate_on, weight_pos, weight_neg, entropy, target)


def _set_by_itself(
    stare: StareConfig, state: ControllerState, reading: EntropyReading, target: float
) -> tuple[ControllerState, Control]:
    """The weights that the batch asks for (`algo.auto`).

    Raises:
        TypeError: the reading has no forces; the door should have refused its scoring.
    """
    if not isinstance(reading, ForcedReading):
        raise TypeError('weight = "auto" reads what the tokens are expected to do, and there was no scoring pass')
    damped = stare.variant == "C2"
    gain = auto.observe(
        state.gain,
        reading.entropy,
        target,
        reading.forces,
        time_constant=stare.time_constant,
        most=stare.weight_bound - 1.0,
        damped=damped,
    )
    u = gain.strength
    control = Control(u > 0.0, 1.0 + u, 1.0 / (1.0 + u), reading.entropy, target, gain=gain.estimate()[0])
    return replace(state, gain=gain), control


def _proportional_integral(stare: StareConfig, integral: float, gap: float) -> tuple[float, float, float]:
    """The new integral term I and this step's weights, from e = H_tgt - H, nats.

    I <- clip(I + ki e, 0, W - 1);  u = clip(kp e + I, 0, W - 1);  weights 1 + u and 1 + u (M - 1) / (W - 1)

    I is bounded on both sides (anti-windup): neither a start far above the target nor a stay at full weights has to be
    unlearned. At a steady state e = 0 and I alone holds the weight that the target needs.
    """
    most = stare.weight_pos - 1.0
    integral = min(max(integral + stare.ki * gap, 0.0), most)
    strength = min(max(stare.kp * gap + integral, 0.0), most)
    return integral, 1.0 + strength, 1.0 + strength * (stare.weight_neg - 1.0) / most


def observe_without_gate(
    config: AlgorithmConfig, state: ControllerState, reading: EntropyReading
) -> tuple[ControllerState, Control]:
    """For methods without a gate: never on, weights 1. The configured target is kept as a line to plot against.

    Raises:
        RunError: H is not finite.
    """
    entropy = reading.entropy
    if not math.isfinite(entropy):
        raise RunError(f"the update batch's mean entropy is {entropy}")
    target = target_entropy(config.stare, state.steps)
    return replace(state, steps=state.steps + 1), Control(False, 1.0, 1.0, entropy, target)
