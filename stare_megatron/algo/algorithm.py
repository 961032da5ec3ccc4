"""What a method is: four functions and a flag. A file of algo/losses/ states those that are not GRPO's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stare_megatron.algo import controller, stare
from stare_megatron.algo.advantages import Outcome, group_relative
from stare_megatron.algo.comm import Comm
from stare_megatron.algo.controller import ControllerState
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.algo.stare import Candidates, Weights
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import Control, EntropyReading


def relative_reward(outcomes: Sequence[Outcome], config: AlgorithmConfig) -> tuple[float, ...]:
    """The group-relative advantage of the plain rewards."""
    return group_relative([o.reward for o in outcomes], normalize_std=config.normalize_std)


def equal_weights(tokens: Candidates, control: Control, config: AlgorithmConfig, comm: Comm) -> Weights:
    """Weight 1 everywhere; nothing is chosen."""
    return stare.weigh_equally(tokens, comm)


def by_entropy_alone(config: AlgorithmConfig) -> bool:
    """The controller reads nothing else."""
    return False


@dataclass(frozen=True)
class Algorithm:
    """A method.

    `loss(action tokens of a micro-batch, config)` -> per-token values, unreduced; its only collectives are those of
    `LossInputs.sequences`, called equally often whatever the tokens are.
    `advantage(trajectories of a whole group, config)` -> one advantage a trajectory.
    `controller(config, state, entropy reading)` -> new state and this step's `Control`; `controller.initial` makes the
    first state.
    `foresees(config)` -> whether it also reads what the tokens, and those that `weigh` chooses, are expected to do to
    the entropy: its reading is then a `ForcedReading`.
    `weigh(tokens of the scope, control, config, comm)` -> token weights and chosen tokens; a collective.
    `entropy_gradient`: `LossInputs.entropy_T` is differentiable.
    """

    loss: Callable[[LossInputs, AlgorithmConfig], TokenLoss]
    advantage: Callable[[Sequence[Outcome], AlgorithmConfig], tuple[float, ...]] = relative_reward
    controller: Callable[[AlgorithmConfig, ControllerState, EntropyReading], tuple[ControllerState, Control]] = (
        controller.observe_without_gate
    )
    weigh: Callable[[Candidates, Control, AlgorithmConfig, Comm], Weights] = equal_weights
    foresees: Callable[[AlgorithmConfig], bool] = by_entropy_alone
    entropy_gradient: bool = False


class EntropyController:
    """The controller of a run's method and its state, which belongs into a checkpoint."""

    def __init__(self, config: AlgorithmConfig, algorithm: Algorithm) -> None:
        self._config = config
        self._algorithm = algorithm
        self.state = controller.initial(config)

    def observe(self, reading: EntropyReading) -> Control:
        """Advance the entropy controller; return this step's control."""
        self.state, control = self._algorithm.controller(self._config, self.state, reading)
        return control
