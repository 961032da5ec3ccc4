"""What the trainer tells of sampled tokens is what it trained on, at every layout, and nothing is kept unasked."""

from typing import Any

import numpy as np
import pytest
from launch import launch
from step_cases import first_tokens, make_checkpoint, make_groups

from stare_megatron.algo.advantages import group_relative
from stare_megatron.types import Status
from stare_megatron.types.token_record import TokenRecord, join


def layout(ranks: int, **keys: Any) -> dict[str, Any]:
    return {"trainer": {"world_size": ranks, "micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}} | keys}


CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"reference": layout(1), "no scoring pass": layout(1, scoring="rollout")},
    2: {
        "CP2": layout(2, context_parallel=2),
        "TP2": layout(2, tensor_parallel=2),
        "PP2": layout(2, pipeline_parallel=2),
        "DP2": layout(2),
    },
}
NAMES = [(ranks, name) for ranks, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By number of ranks, then by rank."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")
    return {
        ranks: launch("token_record_cases:records", ranks, {"checkpoint": checkpoint, "cases": cases})
        for ranks, cases in CASES.items()
    }


def joined(by_rank: list[dict[str, Any]], name: str) -> dict[int, TokenRecord]:
    parts = [seen[name]["records"] for seen in by_rank]
    return {first: join([p[first] for p in parts if first in p]) for first in set().union(*parts)}


@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_records_are_those_of_the_reference(outcomes, ranks, name):
    want, got = joined(outcomes[1], "reference"), joined(outcomes[ranks], name)
    assert got.keys() == want.keys()
    for first, record in got.items():
        assert np.array_equal(record.known, want[first].known)
        assert np.array_equal(record.advantage, want[first].advantage)
        for column in ("logprob", "raw_logprob", "entropy"):
            assert record.__dict__[column] == pytest.approx(want[first].__dict__[column], abs=2e-5), (first, column)


@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_selection_and_weights_are_those_of_the_update(outcomes, ranks, name):
    found, weights = set(), {1: set(), -1: set(), 0: set()}
    for first, record in joined(outcomes[ranks], name).items():
        found |= {first + int(i) for i in record.selected.nonzero()[0]}
        for code, seen in weights.items():
            seen |= set(record.weight[record.known & (record.selection == code)].tolist())
    assert found == {i for seen in outcomes[ranks] for i in seen[name]["selected"]}
    assert weights == {1: {1.5}, -1: {0.5}, 0: {1.0}}


def test_records_fit_the_trajectories(outcomes):
    groups = make_groups()
    firsts = first_tokens(groups)
    records = joined(outcomes[1], "reference")
    assert set(firsts.values()) == records.keys()
    for group in groups:
        counted = [i for i, t in enumerate(group.trajectories) if t.status is not Status.FAILED]
        advantages = group_relative([group.scores[i].reward for i in counted], normalize_std=True)
        for i, advantage in zip(counted, advantages, strict=True):
            trajectory = group.trajectories[i]
            if not trajectory.num_action_tokens:
                continue
            record = records[firsts[trajectory.prompt_id, trajectory.sample]]
            assert np.array_equal(record.known, trajectory.action_mask())
            assert set(record.advantage[record.known].tolist()) == {np.float32(advantage)}
            assert not record.logprob[~record.known].any()
            assert (record.logprob[record.known] < 0).all()


@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_nothing_is_kept_unasked_or_twice(outcomes, ranks, name):
    assert all(seen[name]["left"] == [{}, {}] for seen in outcomes[ranks])
