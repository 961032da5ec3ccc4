"""The plan of a supervised run: its ranks in the update, which is all that a step is, and a save. No engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.config import Config, SftConfig
from stare_megatron.errors import UserError
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.console import mean
from stare_megatron.models.layout import check_experts, check_fp8, check_layout
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan import violations
from stare_megatron.plan.cures import Cures, Outcome
from stare_megatron.plan.estimate import Given
from stare_megatron.plan.hardware import Gpu
from stare_megatron.plan.lengths import Lengths, assumed
from stare_megatron.plan.memory import Phase, RankInput, Use, fullest_rank, residency
from stare_megatron.plan.moves import HostMemory, host_memory, moves
from stare_megatron.plan.timing import PassTime, Ranks, SaveTime, save_time

# Of the longest sequence, where nothing is known: its prompt, and what is learned.
_PROMPT_SHARE, _LEARNED_SHARE = 0.125, 0.375
_NEWEST = 10  # steps of a run that are looked at


@dataclass(frozen=True)
class SupervisedPlan:
    """`config`: `planned`; `update`: with `moved`, the seconds of `trainer.offload`, apart. `given.lengths`: of one
    batch, a response being what is learned of a sequence."""

    config: Config
    shape: ModelShape
    given: Given
    uses: tuple[Use, ...]
    update: PassTime
    moved: float
    save: SaveTime
    host: HostMemory
    violations: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of a step without saving."""
        return self.update.seconds + self.moved

    @property
    def tokens(self) -> float:
        """Of a step's batch, learned or not."""
        return sum(self.given.lengths.sequences) * self.given.lengths.weight

    def tightest(self) -> Use:
        """Where the least is free."""
        return min(self.uses, key=lambda use: use.free)


def planned(config: SftConfig, batch: int) -> Config:
    """The ranks' settings, with batches of `batch` sequences."""
    ranks = config.for_ranks()
    rollout = ranks.rollout.model_copy(update={"prompts_per_step": batch, "group_size": 1})
    return ranks.model_copy(update={"rollout": rollout})


def batch_lengths(config: SftConfig, prompt: float, learned: float, run: Path | None) -> Lengths:
    """Of one batch. `prompt`, `learned`: means in tokens, 0: assumed; `run`: a folder of `sft` whose means to take.

    Raises:
        UserError: no metrics of `sft` there.
    """
    longest, source = config.sft.max_tokens, ""
    if run is not None:
        rows = jsonl.read_steps(run / jsonl.FILE)[-_NEWEST:]
        sequences, tokens, done = (
            mean(rows, name) for name in ("sft/sequences", "sft/tokens", "throughput/trained_tokens")
        )
        if not sequences >= 1 or not done >= 1:
            raise UserError(f"--lengths {run}: its metrics have no sft/tokens; name the folder of a run of `sft`")
        prompt, learned = (tokens - done) / sequences, done / sequences
        source = f"{run}: mean {tokens / sequences:,.0f} in the newest {len(rows)} steps, {done / tokens:.0%} learned"
    prompt = min(prompt or longest * _PROMPT_SHARE, longest - 1)
    learned = min(learned or longest * _LEARNED_SHARE, longest - prompt)
    count = config.sft.batch_sequences
    if config.sft.batch_tokens:
        count = max(1, int(config.sft.batch_tokens // (prompt + learned)))
    found = assumed(
        count, longest=round(longest - prompt), longest_prompt=longest, response=learned, prompt=max(prompt, 1e-6)
    )
    said = f"assumed: log-normal, mean {prompt + learned:,.0f}, of it {learned:,.0f} learned, cut at {longest:,}"
    return dataclasses.replace(found, source=source or said)


def make(run: SftConfig, shape: ModelShape, given: Given) -> SupervisedPlan:
    """The plan of a supervised run. Where the model cannot be split so, sizes are of the split's next smaller part."""
    batch = round(len(given.lengths.responses) * given.lengths.weight)
    config = planned(run, batch)
    m = given.machine
    wrong = of_layout(run, config, shape, m.gpu, given.nodes)
    layout = len(wrong)

    def used(changed: Config) -> Sequence[Use]:
        count = max(map(len, Ranks(changed, shape, m, given.lengths).batches()))
        rank = RankInput(m.layers, given.pack(changed), count, residency(changed))
        return [Use("rank", Phase.UPDATE, fullest_rank(changed, shape, m.constants, rank, Phase.UPDATE), m.gpu.memory)]

    def outcome(changed: Config) -> Outcome | None:
        if len(of_layout(run, changed, shape, m.gpu, given.nodes)) > layout:
            return None
        seconds = Ranks(changed, shape, m, given.lengths).update().seconds + moves(changed, shape, m).update
        found = used(changed)
        return Outcome(found, True, len(violations.of_memory(found, None)), seconds)

    uses = used(config)
    return SupervisedPlan(
        config=config,
        shape=shape,
        given=given,
        uses=tuple(uses),
        update=Ranks(config, shape, m, given.lengths).update(),
        moved=moves(config, shape, m).update,
        save=save_time(config, shape, m),
        host=host_memory(config, shape, m),
        violations=(*wrong, *violations.of_memory(uses, Cures(config, m.layers, outcome))),
    )


def of_layout(run: SftConfig, config: Config, shape: ModelShape, gpu: Gpu, nodes: int) -> list[str]:
    """What cannot be split or placed so, each with its cure. `nodes`: 0: as many as it takes."""
    t = config.trainer
    checks: Sequence[Callable[[], object]] = (
        *violations.splits(t, shape),
        lambda: check_layout(t, True),
        lambda: check_experts(t, shape),
        lambda: check_fp8(t, shape, None),
    )
    found = violations.refusals(checks)
    if run.sft.max_tokens > shape.max_positions:
        found.append(f"sft.max_tokens = {run.sft.max_tokens}; the model's config.json allows {shape.longest}: lower it")
    found += violations.too_many(t.world_size, gpu, nodes, f"{t.world_size}")
    found += violations.crossing(gpu, {"trainer": t.tensor_parallel})
    return found
