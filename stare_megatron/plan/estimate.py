"""A plan: memory, room, times and violations of one configuration on one kind of GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stare_megatron.config import Config
from stare_megatron.errors import UserError
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan import violations
from stare_megatron.plan.activations import Pack
from stare_megatron.plan.cures import Cures, Outcome
from stare_megatron.plan.hardware import Gpu
from stare_megatron.plan.lengths import Lengths
from stare_megatron.plan.memory import (
    EngineRoom,
    Phase,
    RankInput,
    Use,
    engine_room,
    largest_pack,
    rank_parts,
    residency,
    uses,
)
from stare_megatron.plan.moves import HostMemory, Moves, host_memory, moves
from stare_megatron.plan.sampling import Engine, RolloutTime, rollout_time
from stare_megatron.plan.timing import Machine, PassTime, PushTime, Ranks, SaveTime, push_time, save_time
from stare_megatron.run.sizing import rollout_load, with_engine_sizes

SPARE = 2.0 * 2**30  # of a GPU, beside what is counted
_ALONE = 0.92  # vLLM's share of a GPU that an engine has for itself


@dataclass(frozen=True)
class Given:
    """What a plan is made for, beside the configuration. `nodes`: 0: as many as it takes; `kept`: share of the groups
    that dynamic sampling keeps; `copies`: of the logits in the backward pass; `largest`: tokens of the largest
    micro-batch where that is known, 0: as many as there may be."""

    machine: Machine
    lengths: Lengths
    nodes: int = 0
    kept: float = 1.0
    copies: int = 1
    largest: int = 0

    def pack(self, config: Config) -> Pack:
        """The largest micro-batch."""
        return largest_pack(config, self.lengths, self.copies, self.largest)


@dataclass(frozen=True)
class Plan:
    """`config`: with the engines' sizes that a run would choose. Seconds are of one step; those of `moves` are not
    in the phases' own."""

    config: Config
    shape: ModelShape
    given: Given
    uses: tuple[Use, ...]
    room: EngineRoom
    rollout: RolloutTime
    score: PassTime
    update: PassTime
    push: PushTime
    save: SaveTime
    moves: Moves
    host: HostMemory
    violations: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of a step without saving. Who samples while the trainer works, on devices of its own, takes the longer of the
        two."""
        rollout, learning = self.phase(Phase.ROLLOUT), self.phase(Phase.SCORE) + self.phase(Phase.UPDATE)
        at_once = self.config.sampling.ahead and self.config.inference.placement == "separate"
        both = max(rollout, learning) if at_once else rollout + learning
        return both + self.phase(Phase.PUSH)

    def phase(self, phase: Phase) -> float:
        """Seconds, with what is moved in it."""
        own = {
            Phase.ROLLOUT: (self.rollout.seconds, self.moves.rollout),
            Phase.SCORE: (self.score.seconds, self.moves.score),
            Phase.UPDATE: (self.update.seconds, self.moves.update),
            Phase.PUSH: (self.push.seconds, self.moves.push),
        }
        return sum(own[phase])

    @property
    def gpus(self) -> int:
        return violations.gpus_needed(self.config)

    @property
    def mfu(self) -> float:
        """Of scoring and update, by the ranks' GPUs over their time."""
        time = self.score.seconds + self.update.seconds
        able = time * self.config.trainer.world_size * self.given.machine.gpu.flops
        return (self.score.flops + self.update.flops) / able if able else 0.0

    def tightest(self) -> Use:
        """Where the least is free."""
        return min(self.uses, key=lambda use: use.free)


def sized(config: Config, shape: ModelShape, memory: int) -> tuple[Config, float, str]:
    """The configuration with its engines' sizes, their share of a GPU, and why there is none, "" where there is one."""
    wrong, load = "", rollout_load(config)
    try:
        config = with_engine_sizes(config, shape, memory, load, trainers=True)
    except UserError as e:
        wrong = str(e)
        # The batches follow from the load alone; 0: no memory is known to be shared.
        config = with_engine_sizes(config, shape, 0, load, trainers=True)
    return config, float(config.inference.vllm.get("gpu_memory_utilization", _ALONE)), wrong


def memory_of(config: Config, shape: ModelShape, given: Given) -> tuple[Config, Sequence[Use], EngineRoom, list[str]]:
    """Memory alone: sized configuration, uses, the engines' room, and what these lack."""
    m = given.machine
    config, share, wrong = sized(config, shape, m.gpu.memory)
    room = engine_room(config, shape, m.gpu, given.lengths, share)
    count = max(map(len, Ranks(config, shape, m, given.lengths).batches()))
    rank = RankInput(
        m.layers, largest_pack(config, given.lengths, given.copies, given.largest), count, residency(config)
    )
    used = uses(config, shape, m.gpu, m.constants, rank, room)
    if wrong:
        return config, used, room, [wrong]
    left = roomiest_share(used, m.gpu) if config.inference.placement == "colocated" else 0.0
    return config, used, room, violations.of_engines(config, room, left)


def ranks_fit(config: Config, shape: ModelShape, given: Given) -> bool:
    """Whether the ranks alone fit their GPUs in scoring and update, with some to spare."""
    m = given.machine
    count = max(map(len, Ranks(config, shape, m, given.lengths).batches()))
    rank = RankInput(
        m.layers, largest_pack(config, given.lengths, given.copies, given.largest), count, residency(config)
    )
    beside = m.constants.outside + SPARE
    if config.inference.placement == "colocated":
        beside += m.constants.sleeping
    # The first stage keeps most micro-batches, the last one has the output layer.
    for stage in {0, config.trainer.pipeline_parallel - 1}:
        for phase in (Phase.UPDATE, Phase.SCORE):
            held = sum(rank_parts(config, shape, rank, phase, stage).values())
            if held * (1 + m.constants.fragmented) + beside > m.gpu.memory:
                return False
    return True


def roomiest_share(used: Sequence[Use], gpu: Gpu) -> float:
    """The largest part of a GPU for colocated engines that leaves a rank what it holds while they sample, in
    hundredths; 0 where there is none."""
    rank = max(sum(u.parts[p] for p in u.parts if p.startswith("rank")) for u in used if u.phase is Phase.ROLLOUT)
    return max(0, math.floor(100 * (gpu.memory - rank - SPARE) / gpu.memory)) / 100


def make(config: Config, shape: ModelShape, given: Given, *, cures: bool = True) -> Plan:
    """The plan of a configuration. Where the model cannot be split so, sizes are of the split's next smaller part.
    `cures`: violations say what mends them."""
    m = given.machine
    wrong = violations.of_layout(config, shape, m.gpu, given.nodes)
    layout = len(wrong)

    def outcome(changed: Config) -> Outcome | None:
        if len(violations.of_layout(changed, shape, m.gpu, given.nodes)) > layout:
            return None
        changed, used, _, lacking = memory_of(changed, shape, given)
        left = len(lacking) + len(violations.of_memory(used, None))
        ranks = Ranks(changed, shape, m, given.lengths)
        seconds = ranks.score().seconds + ranks.update().seconds + moves(changed, shape, m).seconds
        return Outcome(used, not lacking, left, seconds)

    tries = Cures(config, m.layers, outcome) if cures else None
    config, used, room, lacking = memory_of(config, shape, given)
    if lacking and tries and (cure := tries.of(None)):
        lacking = [f"{problem}; or {cure}" for problem in lacking]
    wrong += lacking + violations.of_memory(used, tries)
    ranks = Ranks(config, shape, given.machine, given.lengths)
    engine = Engine(config, shape, given.machine, room, room.running)
    return Plan(
        config=config,
        shape=shape,
        given=given,
        uses=tuple(used),
        room=room,
        rollout=rollout_time(engine, given.lengths, given.kept),
        score=ranks.score(),
        update=ranks.update(),
        push=push_time(config, shape, given.machine),
        save=save_time(config, shape, given.machine),
        moves=moves(config, shape, given.machine),
        host=host_memory(config, shape, given.machine),
        violations=tuple(wrong),
    )
