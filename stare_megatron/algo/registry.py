"""Methods by name: four functions each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stare_megatron.algo import controller, stare
from stare_megatron.algo.advantages import group_relative
from stare_megatron.algo.controller import ControllerState
from stare_megatron.algo.losses.grpo import grpo_loss
from stare_megatron.algo.losses.stare import stare_loss
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.algo.shards import Shards
from stare_megatron.algo.stare import Candidates, Weights
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import Control


@dataclass(frozen=True)
class Algorithm:
    """A method.

    `advantage(rewards of a whole group, config)` -> one advantage a trajectory.
    `controller(config, state, mean entropy)` -> new state and this step's `Control`; `controller.initial` makes the
    first state.
    `weigh(tokens of the scope, control, config, shards)` -> token weights; a collective.
    `loss(action tokens of a micro-batch, config)` -> per-token values, unreduced; no collective.
    """

    advantage: Callable[[Sequence[float], AlgorithmConfig], tuple[float, ...]]
    controller: Callable[[AlgorithmConfig, ControllerState, float], tuple[ControllerState, Control]]
    weigh: Callable[[Candidates, Control, AlgorithmConfig, Shards], Weights]
    loss: Callable[[LossInputs, AlgorithmConfig], TokenLoss]


def _group_relative(rewards: Sequence[float], config: AlgorithmConfig) -> tuple[float, ...]:
    return group_relative(rewards, normalize_std=config.normalize_std)


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        advantage=_group_relative,
        controller=controller.observe_without_gate,
        weigh=lambda tokens, control, config, shards: stare.weigh_equally(tokens, shards),
        loss=grpo_loss,
    ),
    "stare": Algorithm(
        advantage=_group_relative,
        controller=controller.observe,
        weigh=lambda tokens, control, config, shards: stare.weigh(tokens, control, config.stare, shards),
        loss=stare_loss,
    ),
}
