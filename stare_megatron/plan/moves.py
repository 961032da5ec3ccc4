"""What `trainer.offload` and a reference policy (`algorithm.kl`) move between a GPU and its host in a step, and what
the host must hold. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from stare_megatron.config import Config
from stare_megatron.models.layout import element_bytes
from stare_megatron.models.shape import ModelShape
from stare_megatron.models.weights import parameters
from stare_megatron.plan.parameters import arena_bytes, fullest
from stare_megatron.plan.timing import Machine


@dataclass(frozen=True)
class Moves:
    """Seconds by phase, each of them a part of the phase's; `bytes`: of a step, of the fullest rank, both ways."""

    rollout: float
    update: float
    push: float
    bytes: float
    score: float = 0.0

    @property
    def seconds(self) -> float:
        return self.rollout + self.score + self.update + self.push


@dataclass(frozen=True)
class HostMemory:
    """Of a node, bytes. `arenas`: page-locked, what its ranks keep for `trainer.offload` and `algorithm.kl`; `saving`:
    their copies of what a checkpoint is written from."""

    arenas: float
    saving: float
    ranks: int


def moves(config: Config, shape: ModelShape, machine: Machine) -> Moves:
    """One after the other with everything else. Gradients are given up, not moved."""
    away, t = config.trainer.offload, config.trainer
    held = fullest(shape, t, config.model.dtype)
    rate = machine.gpu.host * machine.constants.host
    weights = held.parameters / rate if "parameters" in away else 0.0
    state = 2 * t.updates_per_batch * held.optimizer / rate if "optimizer" in away else 0.0
    # The reference and the policy change places, and change back.
    places = 4 * held.parameters / rate if config.algorithm.kl.on_host else 0.0
    # Parameters come when engines sleep, and leave before these sample.
    size = (2 * weights + state + places) * rate
    return Moves(rollout=weights, update=state, push=weights, bytes=size, score=places)


def host_memory(config: Config, shape: ModelShape, machine: Machine) -> HostMemory:
    """A checkpoint is written from a copy where training goes on meanwhile, where the state leaves the GPU, or where it
    is kept in other types than it is stored in."""
    t = config.trainer
    ranks = min(t.world_size, machine.gpu.per_node)
    arena = arena_bytes(shape, t, config.model.dtype)
    copied = config.checkpoint.asynchronous or arena > 0 or t.optimizer.precision_aware
    arena += fullest(shape, t, config.model.dtype).parameters * config.algorithm.kl.on_host
    byte = element_bytes(config.model.dtype)
    share = parameters(shape) * (byte + (8.0 if byte == 4 else 12.0)) / t.world_size
    return HostMemory(float(ranks * arena), ranks * share if copied else 0.0, ranks)
