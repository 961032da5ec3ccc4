"""What each GPU holds in each phase of a step, by role and part. Bytes.

`residency` is the one place that says which of a rank's states are on its GPU in which phase.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass

from stare_megatron.config import Config
from stare_megatron.models.layout import element_bytes, kv_token_bytes, push_buffers
from stare_megatron.models.shape import ModelShape
from stare_megatron.models.weights import engine_bytes
from stare_megatron.plan.activations import Layers, Pack, float8_copies, score_peak, update_peak
from stare_megatron.plan.hardware import Constants, Gpu
from stare_megatron.plan.lengths import Lengths
from stare_megatron.plan.parameters import Layout, StateBytes, largest

_GIB = 2**30
# An engine's CUDA graphs and libraries' workspaces, and NCCL's buffers where it has several ranks; assumed.
_ENGINE_WORK, _ENGINE_LINKS = 1.0 * _GIB, 1.0 * _GIB
_BLOCK = 16  # tokens of a block of vLLM's KV cache


class Phase(enum.Enum):
    ROLLOUT = "rollout"
    SCORE = "score"
    UPDATE = "update"
    PUSH = "push"


@dataclass(frozen=True)
class Residency:
    """Which of a rank's states are on its GPU."""

    parameters: bool = True
    gradients: bool = True
    optimizer: bool = True

    def parts(self, state: StateBytes) -> dict[str, float]:
        held = {
            "weights": state.parameters * self.parameters,
            "gradients": state.gradients * self.gradients,
            "optimizer": state.optimizer * self.optimizer,
        }
        return {name: float(n) for name, n in held.items() if n}


def residency(config: Config) -> Mapping[Phase, Residency]:
    """As `trainer.offload` says. The optimizer's state, where it is named, comes for the step alone, when activations
    are gone: `rank_parts`."""
    away = config.trainer.offload
    stays = Residency("parameters" not in away, "gradients" not in away, "optimizer" not in away)
    at_work = dataclasses.replace(stays, parameters=True)
    return {
        Phase.ROLLOUT: stays,
        Phase.SCORE: at_work,
        Phase.UPDATE: dataclasses.replace(at_work, gradients=True),
        Phase.PUSH: at_work,
    }


@dataclass(frozen=True)
class Use:
    """What one GPU holds in a phase: `parts` by "role: part"; of a GPU of `capacity`."""

    role: str
    phase: Phase
    parts: Mapping[str, float]
    capacity: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def free(self) -> float:
        return self.capacity - self.total


@dataclass(frozen=True)
class EngineRoom:
    """Of one engine rank on a GPU of `gpu` bytes. `budget`: all it may use; `kv`: what that leaves for its KV cache,
    below 0 where it does not even hold the weights; `token`: a token's keys and values; sequences that are in the cache
    at once, `at_mean` and `at_full` length; `running`: those that an engine runs at a time."""

    gpu: int
    budget: float
    weights: float
    work: float
    kv: float
    token: int
    at_mean: int
    at_full: int
    running: int


def engine_room(config: Config, shape: ModelShape, gpu: Gpu, lengths: Lengths, share: float) -> EngineRoom:
    """`share`: of the GPU's memory that the engine may use; the batch sizes are those of `[inference.vllm]`."""
    table, i = config.inference.vllm, config.inference
    byte = element_bytes(config.model.dtype)
    sequences, tokens = int(table.get("max_num_seqs", 128)), int(table.get("max_num_batched_tokens", 8192))
    weights = engine_bytes(shape, config.model.dtype, i.quantization) / i.tensor_parallel
    width = 4 * shape.hidden + 4 * shape.active_ffn / i.tensor_parallel
    # Of a batch of tokens, and the sampler's float32 logits with a copy.
    work = byte * tokens * width + 8.0 * sequences * shape.vocab
    work += _ENGINE_WORK + (_ENGINE_LINKS if i.tensor_parallel > 1 else 0.0)
    token = kv_token_bytes(shape, i.tensor_parallel, config.model.dtype)
    kv = share * gpu.memory - weights - work
    if "kv_cache_memory_bytes" in table:
        kv = float(table["kv_cache_memory_bytes"])
    room = max(0.0, kv) / token

    def fit(length: float) -> int:
        return int(room // (-(-length // _BLOCK) * _BLOCK))

    at_mean, at_full = fit(lengths.prompt + lengths.response), fit(config.window)
    budget = weights + work + max(0.0, kv) if "kv_cache_memory_bytes" in table else share * gpu.memory
    return EngineRoom(gpu.memory, budget, weights, work, kv, token, at_mean, at_full, min(at_mean, sequences))


@dataclass(frozen=True)
class RankInput:
    """What the ranks' memory follows from, beside the configuration. `pack`: the largest micro-batch; `micro_batches`:
    of an optimizer step on a rank."""

    layers: Layers
    pack: Pack
    micro_batches: int
    residency: Mapping[Phase, Residency]


def rank_parts(config: Config, shape: ModelShape, given: RankInput, phase: Phase, stage: int) -> dict[str, float]:
    """What torch allocates on a rank of pipeline stage `stage`."""
    t, dtype = config.trainer, config.model.dtype
    layout = Layout.of(t)
    state = largest(shape, layout, stage).state(dtype, sharded=layout.sharded, adam=t.optimizer)
    parts = given.residency[phase].parts(state)
    if config.algorithm.kl.on_device:
        parts["reference"] = float(state.parameters)
    if t.fp8 != "none" and "weights" in parts:
        parts["float8 weights"] = float8_copies(shape, layout)
    how = (shape, layout, t, given.layers, dtype, stage, given.pack)
    if phase is Phase.UPDATE:
        peak = update_peak(*how, given.micro_batches)
    elif phase is Phase.SCORE:
        peak = score_peak(*how)
    else:
        buffers = float(push_buffers(shape, dtype, config.sync.method))
        return parts | ({"buffers": buffers} if phase is Phase.PUSH else {})
    passes = parts | {"activations": peak.kept, "logits or layer": max(peak.working, peak.logits)}
    if phase is not Phase.UPDATE or ("optimizer" in parts and not state.copied):
        return passes
    bundle = min(t.offload_step_mb * 2**20 or state.optimizer, state.optimizer)
    step = parts | {"optimizer": bundle * (1 + state.copied / state.optimizer)}
    return max(passes, step, key=lambda found: sum(found.values()))


def largest_pack(config: Config, lengths: Lengths, copies: int = 1, largest: int = 0) -> Pack:
    """A micro-batch of `largest` tokens; without, of the whole budget, or of the longest sequence where that is
    longer."""
    t = config.trainer
    sequences = config.rollout.prompts_per_step * config.rollout.group_size // t.updates_per_batch
    everything = -(-sequences // t.data_parallel) * config.window
    tokens = (largest or min(max(t.micro_batch_tokens, config.window), everything)) / t.context_parallel
    return Pack(tokens, tokens * lengths.action_share, copies)


def fullest_rank(
    config: Config, shape: ModelShape, constants: Constants, given: RankInput, phase: Phase
) -> dict[str, float]:
    """What the rank of the fullest stage holds of its GPU."""
    by_stage = [rank_parts(config, shape, given, phase, s) for s in range(config.trainer.pipeline_parallel)]
    fullest = max(by_stage, key=lambda parts: sum(parts.values()))
    rank = {f"rank: {name}": n for name, n in fullest.items()}
    rank["rank: allocator"] = constants.fragmented * sum(fullest.values())
    return rank | {"rank: CUDA and NCCL": constants.outside}


def uses(
    config: Config, shape: ModelShape, gpu: Gpu, constants: Constants, given: RankInput, room: EngineRoom
) -> list[Use]:
    """Of the fullest GPU of each role in each phase; colocated roles share one."""
    colocated = config.inference.placement == "colocated"
    found = []
    for phase in Phase:
        rank = fullest_rank(config, shape, constants, given, phase)
        engine = {"engine: weights": room.weights, "engine: work": room.work, "engine: KV": max(0.0, room.kv)}
        if not colocated:
            found.append(Use("rank", phase, rank, gpu.memory))
            if phase in (Phase.ROLLOUT, Phase.PUSH):
                found.append(Use("engine", phase, engine, gpu.memory))
            continue
        if phase is Phase.PUSH:
            engine.pop("engine: KV")
        if phase in (Phase.SCORE, Phase.UPDATE):
            engine = {"engine: asleep": constants.sleeping}
        found.append(Use("rank + engine", phase, rank | engine, gpu.memory))
    return found
