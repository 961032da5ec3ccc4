"""Who trains on what: coverage, balance, budgets, denominators, and what is left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron.data.packing import num_micro_batches, pack, plan_updates
from stare_megatron.errors import RunError
from stare_megatron.types import GroupSummary, Status

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


def plan(summaries, *, dp=1, updates=1, budget=100, multiple=1):
    return plan_updates(
        summaries,
        data_parallel=dp,
        updates_per_batch=updates,
        micro_batch_tokens=budget,
        min_micro_batch_multiple=multiple,
    )


def placed(shares) -> dict[tuple[int, int], int]:
    """(group, sample) -> first global token id, over all ranks; fails on a sequence placed twice."""
    found = {}
    for share in shares:
        for a in share.assignments:
            for sample, first in zip(a.samples, a.first_token, strict=True):
                assert (a.group, sample) not in found
                found[a.group, sample] = first
    return found


@given(lengths, st.integers(1, 80), st.integers(0, 7))
def test_pack_places_every_sequence_once_within_the_budget(lengths, budget, spare):
    need = num_micro_batches(lengths, budget)
    bins = pack(lengths, budget, need + spare)
    assert len(bins) == need + spare
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for b in bins:
        assert len(b) <= 1 or sum(lengths[i] for i in b) <= budget


def test_pack_refuses_too_few_micro_batches():
    with pytest.raises(ValueError, match="need 2 micro-batches"):
        pack([5, 5], 5, 1)


def test_pack_evens_the_load_when_there_are_bins_to_spare():
    assert [len(b) for b in pack([5] * 8, 40, 4)] == [2, 2, 2, 2]


@given(
    st.lists(st.lists(st.integers(2, 50), min_size=2, max_size=5), min_size=3, max_size=8),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 4),
)
def test_every_layout_has_the_same_tokens_ids_and_denominators(groups, dp, updates, budget, multiple):
    summaries = [summary([(n, n - 1) for n in g]) for g in groups]
    reference = plan(summaries, updates=updates)
    steps = plan(summaries, dp=dp, updates=updates, budget=budget, multiple=multiple)
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
        (count,) = {s.num_micro_batches for s in shares}
        assert count % multiple == 0
        for s in shares:
            own = [groups[a.group][i] for a in s.assignments for i in a.samples]
            pack(own, budget, count)  # the rank can honour the driver's count
    assert next_id == sum(map(sum, groups))


def test_ranks_are_balanced_by_tokens_longest_first():
    (shares,) = plan([summary([(90, 80), (10, 5), (30, 20), (40, 30), (10, 5)])], dp=2)
    assert sorted(placed(shares[:1])) == [(0, 0)]  # 90 against 40 + 30 + 10 + 10
    assert sorted(placed(shares[1:])) == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_failed_and_empty_trajectories_carry_no_loss():
    statuses = [Status.COMPLETED, Status.FAILED, Status.TRUNCATED, Status.COMPLETED]
    (shares,) = plan([summary([(7, 3), (9, 4), (8, 5), (6, 0)], statuses)])
    assert placed(shares) == {(0, 0): 0, (0, 2): 7}
    assert (shares[0].num_action_tokens, shares[0].num_sequences) == (8, 2)


def test_a_rank_without_sequences_still_has_its_micro_batches():
    (shares,) = plan([summary([(50, 40), (50, 40), (3, 1)])], dp=4, budget=50, multiple=2)
    assert [len(placed([s])) for s in shares] == [1, 1, 1, 0]
    assert {s.num_micro_batches for s in shares} == {2}
    assert pack([], 50, 2) == [[], []]


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
