"""A rank whose state is in host memory while it is not used learns the same, bit for bit, and loses nothing."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make
from launch import launch
from step_cases import make_checkpoint

from stare_megatron.convert.inspection import McoreTensors, differences
from stare_megatron.convert.torch_dist import TorchDist
from tests.invariance.offload_cases import ALL

BFLOAT16, FLOAT16 = {"dtype": "bfloat16"}, {"dtype": "float16"}


def case(ranks: int, model: dict[str, str] | None = None, **trainer: Any) -> dict[str, dict[str, Any]]:
    fixed = {"world_size": ranks, "micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}}
    return {"model": model or {}, "trainer": fixed | trainer}


STREAMED: dict[str, Any] = {"offload_step_mb": 1}  # more than one parameter's state, less than all
ONE = {"float32": case(1), "bfloat16": case(1, BFLOAT16), "two updates a batch": case(1, updates_per_batch=2)}
TWO = {
    "DP2 bfloat16": case(2, BFLOAT16),
    "DP2 whole optimizer": case(2, distributed_optimizer=False),
    "TP2 SP float16": case(2, FLOAT16, tensor_parallel=2, sequence_parallel=True),
    "PP2 VPP2 bfloat16": case(2, BFLOAT16, pipeline_parallel=2, virtual_pipeline=2),
}
MORE = {
    "DP2": case(2),
    "DP2 bfloat16 in bundles": case(2, BFLOAT16, **STREAMED),
    "DP2 bfloat16 whole optimizer": case(2, BFLOAT16, distributed_optimizer=False),
    "CP2 bfloat16": case(2, BFLOAT16, context_parallel=2),
}
BUNDLES = {
    "float32": case(1, **STREAMED),
    "bfloat16": case(1, BFLOAT16, **STREAMED),
    "float16 whole optimizer": case(1, FLOAT16, distributed_optimizer=False, **STREAMED),
}
MOE = {
    "EP2 bfloat16": case(2, BFLOAT16, expert_parallel=2),
    "EP2 bfloat16 in bundles": case(2, BFLOAT16, expert_parallel=2, **STREAMED),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2", layers=8)


def _same(model: Path, ranks: int, cases: dict[str, Any]) -> None:
    arguments = {"checkpoint": model, "cases": cases, "count": 3}
    for found in launch("offload_cases:updates", ranks, arguments):
        for name in cases:
            assert found[name, True] == found[name, False], name


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        pytest.param(1, ONE, id="one rank"),
        pytest.param(1, BUNDLES, id="in bundles"),
        pytest.param(2, TWO, id="two ranks"),
        pytest.param(2, MORE, id="more of two ranks", marks=pytest.mark.runs),
    ],
)
def test_three_updates_are_the_same_bit_for_bit(model, ranks, cases):
    _same(model, ranks, cases)


def test_three_updates_of_experts_are_the_same_bit_for_bit(tmp_path):
    _same(make("qwen3_moe", tmp_path), 2, MOE)


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(case(2, BFLOAT16), id="DP2 bfloat16"), pytest.param(case(1), id="float32", marks=pytest.mark.runs)],
)
def test_saved_exported_and_restored_from_every_state(model, tmp_path, overrides):
    arguments = {"checkpoint": model, "overrides": overrides, "folder": tmp_path}
    for found in launch("offload_cases:saves", overrides["trainer"]["world_size"], arguments):
        expected = found[""][0]
        assert all(went_on == expected for pair in found.values() for went_on in pair)
    saved = sorted(path for path in tmp_path.iterdir() if path.suffix != ".hf")
    assert len(saved) == 20
    first = McoreTensors(TorchDist(saved[0]), optimizer=True)
    assert any("exp_avg" in name for name in first.infos)
    for other in saved[1:]:
        assert list(differences(first, McoreTensors(TorchDist(other), optimizer=True))) == []
    exported = {(path / "model.safetensors").read_bytes() for path in tmp_path.glob("*.hf")}
    assert len(exported) == 1


def test_twenty_cycles_take_no_more_memory(model):
    arguments = {"checkpoint": model, "overrides": case(1, BFLOAT16), "count": 20}
    (found,) = launch("offload_cases:cycles", 1, arguments)
    sizes, tensors = zip(*found, strict=True)
    assert len(set(tensors)) == 1, tensors
    # A heap breathes, by some megabytes at times; a class that is kept twice would grow by one each time, ten from
    # the middle of the first half to that of the second.
    assert statistics.median(sizes[10:]) - statistics.median(sizes[:10]) < 4 << 20, sizes


def test_an_update_that_fails_leaves_everything_in_its_place(model):
    arguments = {"checkpoint": model, "overrides": case(2, BFLOAT16)}
    for found in launch("offload_cases:failures", 2, arguments):
        assert found == ("spoilt", ["gradients", "optimizer"], True)


def test_all_is_every_class():
    from typing import get_args

    from stare_megatron.config.trainer import StateClass

    assert sorted(get_args(StateClass)) == ALL
