"""Who trains on what: sequences over data-parallel ranks, and over micro-batches within a rank.

Pure arithmetic on lengths, run on the driver (first part) and again, with the same answer, on the ranks (second part).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
    summaries: Sequence[GroupSummary],
    *,
    data_parallel: int,
    updates_per_batch: int,
    micro_batch_tokens: int,
    min_micro_batch_multiple: int,
) -> list[tuple[UpdateShare, ...]]:
    """Split an update batch into optimizer steps (outer list) and data-parallel shares (tuple, by rank).

    Groups go to the steps in the driver's order, in equal runs. Within a step sequences are dealt longest first to
    the rank with the fewest tokens. FAILED and UNGRADED trajectories and those without an action token carry no loss:
    they are left out, and not counted in `num_sequences`. Global token ids run over the kept sequences in the
    driver's order.

    Raises:
        RunError: fewer groups than steps, or a step without a single action token.
    """
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
        plans.append(_plan_step(kept, data_parallel, micro_batch_tokens, min_micro_batch_multiple))
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
    kept: Sequence[_Sequence], data_parallel: int, micro_batch_tokens: int, multiple: int
) -> tuple[UpdateShare, ...]:
    bins = _deal([s.num_tokens for s in kept], data_parallel)
    needed = max(num_micro_batches([kept[i].num_tokens for i in members], micro_batch_tokens) for members in bins)
    rounded = -(-needed // multiple) * multiple
    return tuple(
        UpdateShare(
            assignments=_assignments([kept[i] for i in members]),
            num_action_tokens=sum(s.num_action_tokens for s in kept),
            num_sequences=len(kept),
            num_micro_batches=rounded,
        )
        for members in bins
    )


def _assignments(members: Sequence[_Sequence]) -> tuple[Assignment, ...]:
    by_group: dict[int, list[_Sequence]] = {}
    for s in members:
        by_group.setdefault(s.group, []).append(s)
    return tuple(
        Assignment(group, tuple(s.sample for s in own), tuple(s.first_token for s in own))
        for group, own in sorted(by_group.items())
    )


def _deal(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Indices dealt to `bins`, longest first, each to the bin with the fewest tokens; ascending within a bin."""
    loads = [(0, b) for b in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, b = heapq.heappop(loads)
        members[b].append(i)
        heapq.heappush(loads, (load + lengths[i], b))
    return [sorted(m) for m in members]


def _first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices in bins of at most `budget` tokens; a longer sequence has a bin of its own."""
    members: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        b = next((b for b, left in enumerate(room) if left >= lengths[i]), len(room))
        if b == len(room):
            members.append([])
            room.append(budget)
        members[b].append(i)
        room[b] -= lengths[i]
    return [sorted(m) for m in members]


def num_micro_batches(lengths: Sequence[int], budget: int) -> int:
    """Micro-batches that sequences of these lengths need under a token budget; 0 for no sequence."""
    return len(_first_fit(lengths, budget))


def pack(lengths: Sequence[int], budget: int, bins: int) -> list[list[int]]:
    """Indices of the sequences of each of exactly `bins` micro-batches of at most `budget` tokens.

    `bins` must be at least `num_micro_batches(lengths, budget)`; with bins to spare the load is evened out. A sequence
    longer than the budget has a micro-batch of its own. Micro-batches may be empty.
    """
    packed = _first_fit(lengths, budget)
    if len(packed) > bins:
        raise ValueError(f"{len(lengths)} sequences need {len(packed)} micro-batches of {budget} tokens, not {bins}")
    even = _deal(lengths, bins)
    if all(len(m) <= 1 or sum(lengths[i] for i in m) <= budget for m in even):
        return even
    return packed + [[] for _ in range(bins - len(packed))]
