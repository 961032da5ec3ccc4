"""Tokens of several ages: what is selected and measured of each is the same at every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from age_cases import OLDEST, VERSION, aged
from launch import launch
from step_cases import make_checkpoint, make_groups

from stare_megatron.types import Measured

STREAM: dict[str, Any] = {
    "sampling": {"mode": "stream", "max_staleness": OLDEST},
    "inference": {"placement": "separate"},
    "algorithm": {
        "method": "stare",
        "stare": {"variant": "C2", "fraction": 0.1, "target_entropy": 9.0},
        "correction": {"mode": "truncate"},
    },
}


def layout(ranks: int, **keys: Any) -> dict[str, Any]:
    return STREAM | {"trainer": {"world_size": ranks, "micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}} | keys}


CASES = {
    1: {"one": layout(1)},
    2: {
        "DP2": layout(2),
        "TP2": layout(2, tensor_parallel=2),
        "PP2": layout(2, pipeline_parallel=2),
        "CP2": layout(2, context_parallel=2),
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Measured]]]:
    """By layout, of each rank."""
    checkpoint: Path = make_checkpoint(tmp_path_factory.mktemp("ages") / "model")
    made: dict[str, list[dict[str, Measured]]] = {}
    for ranks, cases in CASES.items():
        by_rank = launch("age_cases:learned", ranks, {"checkpoint": checkpoint, "cases": cases})
        for name in cases:
            made[name] = [{part.name: part for part in of[name]} for of in by_rank]
    return made


def test_every_token_is_counted_at_its_age_and_each_age_is_selected_from(found):
    (one,) = found["one"]
    ages: dict[int, int] = {}
    for group in aged(make_groups()):
        for trajectory in group.trajectories:
            if trajectory.status.is_trainable:
                for version, tokens in trajectory.version_runs():
                    ages[VERSION - version] = ages.get(VERSION - version, 0) + tokens
    assert {age: one[f"age/{age}/tokens"].total for age in range(OLDEST + 1)} == ages
    chosen = 0
    for age in range(OLDEST + 1):
        part = one[f"age/{age}/selected"]
        # The least whole number of a tenth, of T+ and of T-.
        assert math.ceil(part.weight / 10) <= part.total <= math.ceil(part.weight / 10) + 1
        chosen += part.total
    assert chosen == one["stare/selected_pos"].total + one["stare/selected_neg"].total


@pytest.mark.parametrize("name", CASES[2])
def test_every_layout_finds_the_same(found, name):
    (one,) = found["one"]
    for got in found[name]:
        assert got.keys() == one.keys()
        for key, want in one.items():
            if key.endswith(("tokens", "selected", "selected_pos", "selected_neg")):
                assert got[key] == want, key
            else:
                assert got[key].weight == want.weight
                assert got[key].value == pytest.approx(want.value, abs=1e-4), key
