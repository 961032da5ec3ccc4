"""Who trains on what: coverage, balance, budgets, denominators, and what is left out."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron.config import TrainerConfig
from stare_megatron.data.packing import cost_imbalance, num_micro_batches, pack, partition, plan_updates
from stare_megatron.errors import RunError
from stare_megatron.types import GroupSummary, SequenceCost, Status
from tests.properties import bounded

EVEN = SequenceCost(1.0, 0.0)
LONG = SequenceCost(1.0, 0.1)
lengths = st.lists(st.integers(1, 60), max_size=40)


def summary(tokens: list[tuple[int, int]], statuses: list[Status] | None = None) -> GroupSummary:
    n = len(tokens)
    return GroupSummary(
        prompt_id="p",
        source="s",
        rewards=(0.0,) * n,
        correct=(False,) * n,
        num_tokens=tuple(t for t, _ in tokens),
        num_action_tokens=tuple(a for _, a in tokens),
        statuses=tuple(statuses or [Status.COMPLETED] * n),
        weight_versions=(0,) * n,
        graded=(True,) * n,
        reflections=(0,) * n,
        distinct_correct=0,
    )


def plan(summaries, *, dp=1, updates=1, budget=100, stages=1, cost=EVEN):
    trainer = TrainerConfig(
        world_size=dp * stages,
        pipeline_parallel=stages,
        virtual_pipeline=stages,
        updates_per_batch=updates,
        micro_batch_tokens=budget,
    )
    return plan_updates(summaries, trainer, cost)


def placed(shares) -> dict[tuple[int, int], int]:
    """(group, sample) -> first global token id, over all ranks; fails on a sequence placed twice."""
    found = {}
    for share in shares:
        for a in share.assignments:
            for sample, first in zip(a.samples, a.first_token, strict=True):
                assert (a.group, sample) not in found
                found[a.group, sample] = first
    return found


@bounded(100)
@given(lengths, st.integers(1, 80), st.integers(0, 7))
def test_pack_places_every_sequence_once_within_the_budget(lengths, budget, spare):
    need = num_micro_batches(lengths, budget)
    costs = [LONG(n) for n in lengths]
    bins = pack(lengths, costs, budget, need + spare)
    assert len(bins) == need + spare
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for b in bins:
        assert len(b) <= 1 or sum(lengths[i] for i in b) <= budget
    loads = [sum(costs[i] for i in b) for b in bins]
    assert loads == sorted(loads, reverse=True)


def test_pack_refuses_too_few_micro_batches():
    with pytest.raises(ValueError, match="need 2 micro-batches"):
        pack([5, 5], [1.0, 1.0], 5, 1)


def test_pack_evens_the_load_when_there_are_bins_to_spare():
    assert [len(b) for b in pack([5] * 8, [5.0] * 8, 40, 4)] == [2, 2, 2, 2]


def test_pack_evens_costs_as_far_as_the_budget_allows():
    """By cost alone 8 would be by itself and the others together, 12 tokens long."""
    lengths = [8, 3, 3, 3, 3]
    assert pack(lengths, [LONG(n) for n in lengths], 12, 2) == [[1, 2, 3, 4], [0]]
    assert pack(lengths, [LONG(n) for n in lengths], 11, 2) == [[0, 4], [1, 2, 3]]


def least(costs: list[int], bins: int) -> int:
    """The least that the costliest of `bins` can have, of all ways."""
    ways = itertools.product(range(bins), repeat=len(costs))
    return min(max(sum(c for c, b in zip(costs, way, strict=True) if b == bin) for bin in range(bins)) for way in ways)


def makespan(found: list[list[int]], costs: list[int]) -> int:
    return max(sum(costs[i] for i in members) for members in found)


@bounded(60)
@given(st.lists(st.integers(0, 40), max_size=7), st.integers(1, 3))
def test_partition_against_all_ways(costs, bins):
    """The bound is that of Michiels, Korst and Aarts (2003) for the differencing method."""
    found = partition(costs, bins)
    assert sorted(i for members in found for i in members) == list(range(len(costs)))
    assert len(found) == bins
    best = least(costs, bins)
    assert best <= makespan(found, costs) <= (4 / 3 - 1 / (3 * bins)) * best


def longest_first(costs: list[int], bins: int) -> int:
    loads = [0] * bins
    for cost in sorted(costs, reverse=True):
        loads[loads.index(min(loads))] += cost
    return max(loads)


@bounded(100)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=80), st.integers(1, 9))
def test_partition_is_never_worse_than_longest_first_and_always_the_same(costs, bins):
    found = partition(costs, bins)
    assert sorted(i for members in found for i in members) == list(range(len(costs)))
    assert makespan(found, costs) <= longest_first(costs, bins)
    assert found == partition(list(costs), bins)


def test_differences_cancel_where_longest_first_does_not():
    costs = [8, 7, 6, 5, 4]  # of Karmarkar and Karp's paper
    assert longest_first(costs, 2) == 17
    assert makespan(partition(costs, 2), costs) == 16


def long_tailed(count: int, seed: int) -> list[int]:
    """Mean just below 5k tokens, one in sixty at the limit of 32k."""
    rng = np.random.default_rng(seed)
    usual = rng.lognormal(math.log(4200), 0.3, count).astype(int).tolist()
    return [32768 if i % 60 == 0 else n for i, n in enumerate(usual)]


@pytest.mark.parametrize("seed", range(3))
def test_a_long_tail_is_balanced_where_tokens_are_not(seed):
    """Qwen3-32B's cost: attention is a third of it at 32k."""
    cost = SequenceCost(6.4e10, 1.05e6)
    lengths = long_tailed(608, seed)
    assert 4700 < sum(lengths) / len(lengths) < 5300
    ranks = partition([cost(n) for n in lengths], 64)
    by_tokens = partition([float(n) for n in lengths], 64)

    def imbalance(found: list[list[int]]) -> float:
        return cost_imbalance([[sum(cost(lengths[i]) for i in members)] for members in found])

    assert imbalance(ranks) < 0.05
    assert imbalance(by_tokens) > 0.2


def test_thousands_of_sequences_are_planned_fast():
    """Tens of milliseconds on an idle core."""
    summaries = [summary([(n, n - 1) for n in long_tailed(16, seed)]) for seed in range(256)]
    began = time.process_time()
    (shares,) = plan(summaries, dp=64, budget=32768, cost=SequenceCost(6.4e10, 1.05e6))
    assert time.process_time() - began < 2
    assert len(placed(shares)) == 4096
    assert shares[0].cost_imbalance < 0.05


def test_what_waiting_costs():
    assert cost_imbalance([[3.0, 1.0], [2.0, 2.0]]) == 0.0
    assert cost_imbalance([[6.0, 2.0], [2.0, 2.0]]) == 8 / 6 - 1
    # Ranks 0 and 1 meet in both micro-batches, so do 2 and 3: the slower pair takes 3 + 2.
    assert cost_imbalance([[3.0, 1.0], [2.0, 2.0], [2.0, 2.0], [1.0, 1.0]], lockstep=2) == pytest.approx(5 / 3.5 - 1)
    assert cost_imbalance([[0.0], [0.0]]) == 0.0


def test_experts_make_ranks_meet():
    def lockstep(**sizes):
        return TrainerConfig(world_size=16, **sizes).lockstep

    assert lockstep() == lockstep(tensor_parallel=4) == 1
    assert lockstep(expert_parallel=8) == 8
    assert lockstep(expert_parallel=4, tensor_parallel=2) == 4
    etp1 = {"megatron": {"expert_tensor_parallel_size": 1}}
    assert lockstep(expert_parallel=4, tensor_parallel=2, **etp1) == 2
    assert lockstep(expert_parallel=4, tensor_parallel=2, context_parallel=2, **etp1) == 1


def test_ranks_that_meet_in_every_micro_batch_are_reported_so():
    groups = [summary([(n, n - 1) for n in (90, 40, 40, 20)])] * 2
    trainer = TrainerConfig(world_size=2, micro_batch_tokens=100)
    plain, experts = (
        plan_updates(groups, trainer.model_copy(update={"expert_parallel": size}), LONG)[0] for size in (1, 2)
    )
    grid = [[sum(LONG(own[n]) for n in bin) for bin in s.micro_batches] for s in plain for own in [tokens(s, groups)]]
    assert {s.cost_imbalance for s in plain} == {cost_imbalance(grid)}
    assert {s.cost_imbalance for s in experts} == {cost_imbalance(grid, 2)}
    assert {s.largest_tokens for s in plain} == {
        max(sum(own[n] for n in bin) for s in plain for own in [tokens(s, groups)] for bin in s.micro_batches)
    }


def tokens(share, groups) -> list[int]:
    """Lengths of a share's sequences, in its order."""
    return [groups[a.group].num_tokens[i] for a in share.assignments for i in a.samples]


@bounded(100)
@given(
    st.lists(st.lists(st.integers(2, 50), min_size=2, max_size=5), min_size=3, max_size=8),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 4),
)
def test_every_layout_has_the_same_tokens_ids_and_denominators(groups, dp, updates, budget, stages):
    summaries = [summary([(n, n - 1) for n in g]) for g in groups]
    reference = plan(summaries, updates=updates)
    steps = plan(summaries, dp=dp, updates=updates, budget=budget, stages=stages, cost=LONG)
    next_id = 0
    for alone, shares in zip(reference, steps, strict=True):
        assert len(shares) == dp
        where = placed(shares)
        assert where == placed(alone)
        for key in sorted(where):  # driver's order, without gaps, across the steps
            assert where[key] == next_id
            next_id += groups[key[0]][key[1]]
        assert {s.num_action_tokens for s in shares} == {alone[0].num_action_tokens}
        assert {s.num_sequences for s in shares} == {len(where)}
        (count,) = {len(s.micro_batches) for s in shares}
        assert count % stages == 0
        for s in shares:
            own = tokens(s, summaries)
            assert sorted(n for bin in s.micro_batches for n in bin) == list(range(len(own)))
            assert all(len(bin) <= 1 or sum(own[n] for n in bin) <= budget for bin in s.micro_batches)
    assert next_id == sum(map(sum, groups))


def test_ranks_are_balanced_by_cost():
    group = [summary([(90, 80), (10, 5), (30, 20), (40, 30), (10, 5)])]
    (shares,) = plan(group, dp=2)
    assert sorted(len(placed([s])) for s in shares) == [1, 4]  # 90 against 40 + 30 + 10 + 10
    (shares,) = plan([summary([(64, 60), *[(16, 15)] * 8])], dp=2, cost=LONG)
    assert sorted(sum(tokens(s, [summary([(64, 60), *[(16, 15)] * 8])])) for s in shares) == [64, 128]


def test_failed_and_empty_trajectories_carry_no_loss():
    statuses = [Status.COMPLETED, Status.FAILED, Status.TRUNCATED, Status.COMPLETED]
    (shares,) = plan([summary([(7, 3), (9, 4), (8, 5), (6, 0)], statuses)])
    assert placed(shares) == {(0, 0): 0, (0, 2): 7}
    assert (shares[0].num_action_tokens, shares[0].num_sequences) == (8, 2)


def test_a_rank_without_sequences_still_has_its_micro_batches():
    (shares,) = plan([summary([(50, 40), (50, 40), (3, 1)])], dp=4, budget=50, stages=2)
    assert sorted(len(placed([s])) for s in shares) == [0, 1, 1, 1]
    assert {len(s.micro_batches) for s in shares} == {2}
    assert pack([], [], 50, 2) == [[], []]


@pytest.mark.parametrize("statuses", [[Status.FAILED] * 2, [Status.COMPLETED] * 2])
def test_a_step_without_action_tokens_stops_the_run(statuses):
    empty = summary([(5, 0), (5, 0)], statuses)
    with pytest.raises(RunError, match=r"optimizer step 2 of 2 .* no action token"):
        plan([summary([(5, 2)]), empty], updates=2)


def test_fewer_groups_than_steps_stop_the_run():
    with pytest.raises(RunError, match="1 groups cannot fill 2"):
        plan([summary([(5, 2)])], updates=2)


def test_it_is_said_why_nothing_can_be_learned_from():
    statuses = [Status.OVERLONG, Status.VOID, Status.OVERLONG, Status.INEXACT, Status.UNGRADED, Status.FAILED]
    with pytest.raises(RunError) as raised:
        plan([summary([(9, 4)] * 6 + [(5, 0)], [*statuses, Status.COMPLETED])])
    said = str(raised.value)
    assert "of 7 trajectories 2 overlong (cut off at a budget; rollout.overlong = " in said
    for part in ("1 void (", "env.void_turns", "1 inexact (", "1 not graded (", "1 failed (", "1 empty"):
        assert part in said
