"""Who trains on what: sequences over data-parallel ranks, and over micro-batches within a rank.

Pure arithmetic on lengths and what they cost. Attention's part grows with the square of the length, so that equal
tokens are no equal work: 32 k tokens of one sequence take Qwen3-32B 1.4 times as long as eight times 4 k.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stare_megatron.config import TrainerConfig
from stare_megatron.errors import RunError
from stare_megatron.types import Assignment, GroupSummary, Status, UpdateShare


@dataclass(frozen=True)
class _Sequence:
    group: int
    sample: int
    num_tokens: int
    num_action_tokens: int
    first_token: int


def plan_updates(
    summaries: Sequence[GroupSummary], trainer: TrainerConfig, cost: Callable[[int], float]
) -> list[tuple[UpdateShare, ...]]:
    """Split an update batch into optimizer steps (outer list) and data-parallel shares (tuple, by rank).

    Groups go to the steps in the driver's order, in equal runs. Within a step the cost is evened out over the ranks,
    and within a rank over as many micro-batches as the rank with the most needs under `trainer.micro_batch_tokens`;
    the costliest come first, so that ranks which meet in each of them (`trainer.lockstep`) meet in similar ones.
    `cost` of a sequence by its tokens, in any unit. FAILED and UNGRADED trajectories and those without an action token
    carry no loss: they are left out, and not counted in `num_sequences`. Global token ids run over the kept sequences
    in the driver's order.

    Raises:
        RunError: fewer groups than steps, or a step without a single action token.
    """
    updates_per_batch = trainer.updates_per_batch
    if len(summaries) < updates_per_batch:
        raise RunError(f"an update batch of {len(summaries)} groups cannot fill {updates_per_batch} optimizer steps")
    plans, first_token = [], 0
    for step in range(updates_per_batch):
        begin, end = (len(summaries) * i // updates_per_batch for i in (step, step + 1))
        kept = []
        for group in range(begin, end):
            for sequence in _kept(summaries[group], group, first_token):
                kept.append(sequence)
                first_token += sequence.num_tokens
        if not kept:
            raise RunError(
                f"optimizer step {step + 1} of {updates_per_batch} in this update batch has no action token to learn "
                f"from: {_left_out(summaries[begin:end])}"
            )
        plans.append(_plan_step(kept, trainer, cost))
    return plans


def _left_out(summaries: Sequence[GroupSummary]) -> str:
    """How many of the trajectories are out of the loss, and for what."""
    why = Counter(
        "empty" if status.is_trainable else _MEANING[status] for summary in summaries for status in summary.statuses
    )
    return f"of {why.total()} trajectories " + ", ".join(f"{count} {text}" for text, count in why.most_common())


_MEANING = {
    Status.FAILED: "failed (in the engine or the environment)",
    Status.UNGRADED: "not graded (does the reward get answers it can read?)",
    Status.INEXACT: "inexact (could not be continued from exactly the sampled tokens)",
    Status.VOID: 'void (a turn with neither a call nor a final answer; env.void_turns = "mask")',
    Status.OVERLONG: 'overlong (cut off at a budget; rollout.overlong = "mask")',
}


def _kept(summary: GroupSummary, group: int, first_token: int) -> list[_Sequence]:
    kept = []
    for sample, status in enumerate(summary.statuses):
        if not status.is_trainable or summary.num_action_tokens[sample] == 0:
            continue
        tokens = summary.num_tokens[sample]
        kept.append(_Sequence(group, sample, tokens, summary.num_action_tokens[sample], first_token))
        first_token += tokens
    return kept


def _plan_step(
    kept: Sequence[_Sequence], trainer: TrainerConfig, cost: Callable[[int], float]
) -> tuple[UpdateShare, ...]:
    budget = trainer.micro_batch_tokens
    costs = [cost(s.num_tokens) for s in kept]
    ranks = partition(costs, trainer.data_parallel)
    lengths = [[kept[i].num_tokens for i in members] for members in ranks]
    # The interleaved schedule wants a multiple of the stages.
    multiple = trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1
    count = -(-max(num_micro_batches(own, budget) for own in lengths) // multiple) * multiple
    packed = [
        pack(own, [costs[i] for i in members], budget, count) for own, members in zip(lengths, ranks, strict=True)
    ]
    grid = [[sum(costs[members[n]] for n in bin) for bin in bins] for bins, members in zip(packed, ranks, strict=True)]
    largest = max(sum(own[n] for n in bin) for bins, own in zip(packed, lengths, strict=True) for bin in bins)
    return tuple(
        UpdateShare(
            assignments=_assignments([kept[i] for i in members]),
            num_action_tokens=sum(s.num_action_tokens for s in kept),
            num_sequences=len(kept),
            micro_batches=tuple(map(tuple, bins)),
            cost_imbalance=cost_imbalance(grid, trainer.lockstep),
            largest_tokens=largest,
        )
        for members, bins in zip(ranks, packed, strict=True)
    )


def cost_imbalance(costs: Sequence[Sequence[float]], lockstep: int = 1) -> float:
    """How much longer a step takes, by the cost model, than if all ranks had the same to do: max / mean - 1.

    `costs`: of each rank's micro-batches. Ranks meet at the end of a step, and runs of `lockstep` ranks in every
    micro-batch too.
    """
    blocks = [costs[i : i + lockstep] for i in range(0, len(costs), lockstep)]
    slowest = max(sum(map(max, zip(*block, strict=True))) for block in blocks)
    total = sum(map(sum, costs))
    return slowest * len(costs) / total - 1 if total else 0.0


def _assignments(members: Sequence[_Sequence]) -> tuple[Assignment, ...]:
    by_group: dict[int, list[_Sequence]] = {}
    for s in members:
        by_group.setdefault(s.group, []).append(s)
    return tuple(
        Assignment(group, tuple(s.sample for s in own), tuple(s.first_token for s in own))
        for group, own in sorted(by_group.items())
    )


def partition(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Indices in `bins` lists whose costs are as equal as two methods make them, ascending within a list.

    The better of largest differencing (Karmarkar and Karp 1982, for several bins: Michiels, Korst, Aarts 2003), whose
    costliest bin is at most 4/3 - 1/(3 bins) of the least possible, and longest first.
    """
    return min(_differencing(costs, bins), _longest_first(costs, bins), key=lambda found: _most(found, costs))


def _most(found: Sequence[Sequence[int]], costs: Sequence[float]) -> float:
    return max((sum(costs[i] for i in members) for members in found), default=0.0)


@dataclass(frozen=True)
class _Part:
    """Sequences that stay together: a sequence, or two parts."""

    cost: float
    inner: int | tuple[_Part, _Part]


def _differencing(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Solutions of few sequences are joined, the two most uneven first, so that their differences cancel.

    A solution lists its bins costliest first, without the empty ones.
    """
    heap = [(-cost, i, [_Part(cost, i)]) for i, cost in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, age, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        free = bins - len(other)
        joined = [_Part(a.cost + b.cost, (a, b)) for a, b in zip(one[free:], reversed(other), strict=False)]
        parts = one[:free] + joined + other[: len(other) - len(joined)]
        parts.sort(key=lambda part: -part.cost)
        spread = parts[0].cost - (parts[-1].cost if len(parts) == bins else 0)
        heapq.heappush(heap, (-spread, age, parts))
    found = [_members(part) for part in heap[0][2]] if heap else []
    return found + [[] for _ in range(bins - len(found))]


def _members(part: _Part) -> list[int]:
    found, left = [], [part]
    while left:
        inner = left.pop().inner
        if isinstance(inner, int):
            found.append(inner)
        else:
            left.extend(inner)
    return sorted(found)


def _longest_first(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Costliest first, each to the bin with the least."""
    loads = [(0.0, b) for b in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for i in _descending(costs):
        load, b = heapq.heappop(loads)
        members[b].append(i)
        heapq.heappush(loads, (load + costs[i], b))
    return [sorted(m) for m in members]


def _longest_first_within(
    lengths: Sequence[int], costs: Sequence[float], budget: int, bins: int
) -> list[list[int]] | None:
    """The same among the bins with room for it; None where one finds no bin. A sequence longer than the budget wants
    an empty one."""
    loads, rooms = [0.0] * bins, [budget] * bins
    members: list[list[int]] = [[] for _ in range(bins)]
    for i in _descending(costs):
        fitting = [b for b in range(bins) if lengths[i] <= rooms[b] or not members[b]]
        if not fitting:
            return None
        b = min(fitting, key=loads.__getitem__)
        members[b].append(i)
        loads[b] += costs[i]
        rooms[b] -= lengths[i]
    return [sorted(m) for m in members]


def _first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices in bins of at most `budget` tokens; a longer sequence has a bin of its own."""
    members: list[list[int]] = []
    room: list[int] = []
    for i in _descending(lengths):
        b = next((b for b, left in enumerate(room) if left >= lengths[i]), len(room))
        if b == len(room):
            members.append([])
            room.append(budget)
        members[b].append(i)
        room[b] -= lengths[i]
    return [sorted(m) for m in members]


def _descending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def num_micro_batches(lengths: Sequence[int], budget: int) -> int:
    """Micro-batches that sequences of these lengths need under a token budget; 0 for no sequence."""
    return len(_first_fit(lengths, budget))


def pack(lengths: Sequence[int], costs: Sequence[float], budget: int, bins: int) -> list[list[int]]:
    """Indices of the sequences of each of exactly `bins` micro-batches of at most `budget` tokens, costliest first.

    `bins` must be at least `num_micro_batches(lengths, budget)`. The costs are evened out as far as the budget allows.
    A sequence longer than the budget has a micro-batch of its own. Micro-batches may be empty.
    """
    packed = _first_fit(lengths, budget)
    if len(packed) > bins:
        raise ValueError(f"{len(lengths)} sequences need {len(packed)} micro-batches of {budget} tokens, not {bins}")
    found = partition(costs, bins)
    if not all(len(m) <= 1 or sum(lengths[i] for i in m) <= budget for m in found):
        full = packed + [[] for _ in range(bins - len(packed))]
        within = _longest_first_within(lengths, costs, budget, bins)
        found = full if within is None else min(within, full, key=lambda made: _most(made, costs))
    return sorted(found, key=lambda members: -sum(costs[i] for i in members))
