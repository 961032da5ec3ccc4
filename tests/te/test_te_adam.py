"""Transformer Engine's Adam with its state in fewer bytes, without a GPU: `make test-te`.

The real class in Megatron-Core's real distributed optimizer; its kernels are computed by torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from launch import launch

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("needs the environment of `make test-te`", allow_module_level=True)

LOSSLESS: dict[str, Any] = {"lr": 1e-3, "precision_aware": True}
BFLOAT16 = LOSSLESS | {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
ALL_BFLOAT16 = BFLOAT16 | {"main_grads_dtype": "bfloat16"}
MIXED = LOSSLESS | {"exp_avg_dtype": "float16", "exp_avg_sq_dtype": "float32"}


def case(ranks: int, optimizer: dict[str, Any], dtype: str = "bfloat16", **trainer: Any) -> dict[str, dict[str, Any]]:
    fixed = {"world_size": ranks, "micro_batch_tokens": 64, "optimizer": optimizer}
    return {"model": {"dtype": dtype}, "trainer": fixed | trainer}


CASES = {
    1: {
        "lossless": case(1, LOSSLESS),
        "bfloat16": case(1, BFLOAT16),
        "gradients too": case(1, ALL_BFLOAT16),
        "mixed": case(1, MIXED),
        "float16 model": case(1, BFLOAT16, "float16"),
    },
    2: {
        "lossless DP2": case(2, LOSSLESS),
        "bfloat16 DP2": case(2, BFLOAT16),
        "bfloat16 TP2": case(2, BFLOAT16, tensor_parallel=2),
    },
}
EACH = [(ranks, name) for ranks, cases in CASES.items() for name in cases]
KEYS = ("param", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[dict[Any, Any]]]:
    """What each rank found, by case."""
    seen = {}
    for ranks, cases in CASES.items():
        arguments = {"checkpoint": model, "cases": cases, "folder": tmp_path_factory.mktemp("saved")}
        results = launch("tests.te.adam_worker:compared", ranks, arguments, timeout=900, bare=True)
        seen |= {(ranks, name): [result[name] for result in results] for name in cases}
    return seen


each = pytest.mark.parametrize(("ranks", "name"), EACH)


def alike(one: dict[str, Any], other: dict[str, Any], keys: tuple[str, ...] = (*KEYS, "model")) -> None:
    assert one
    assert one.keys() == other.keys()
    for number, tensors in one.items():
        for key in keys:
            assert np.array_equal(tensors[key].view(np.uint32), other[number][key].view(np.uint32)), (number, key)


@each
def test_state_is_kept_in_the_types_asked_for(found, ranks, name) -> None:
    dtype, optimizer = CASES[ranks][name]["model"]["dtype"], CASES[ranks][name]["trainer"]["optimizer"]
    want = {
        f"exp_avg torch.{optimizer.get('exp_avg_dtype', 'float32')}",
        f"exp_avg_sq torch.{optimizer.get('exp_avg_sq_dtype', 'float32')}",
        f"master_param torch.{'int16' if dtype == 'bfloat16' else 'float32'}",
        f"gradients torch.{optimizer.get('main_grads_dtype', 'float32')}",
    }
    assert all(set(seen["types"]) == want for seen in found[ranks, name])


@each
def test_a_rank_holds_what_the_plan_says(found, ranks, name) -> None:
    for seen in found[ranks, name]:
        for kind in ("plain", "precise"):
            assert seen[kind, "sizes"] == seen["plan"][kind], kind


@pytest.mark.parametrize(("ranks", "name"), [(1, "lossless"), (2, "lossless DP2")])
def test_no_bit_of_a_step_is_lost_with_the_lower_halves_alone(found, ranks, name) -> None:
    """But for halves, which one of the two rounds upwards, the other to even."""
    for seen in found[ranks, name]:
        assert seen["plain", "norm"] == seen["precise", "norm"]
        plain, precise = seen["plain", "state"], seen["precise", "state"]
        alike(plain, precise, KEYS)
        different = [(plain[n]["model"] != precise[n]["model"]).sum() for n in plain]
        assert sum(different) < 1e-3 * sum(len(plain[n]["model"]) for n in plain)


@each
def test_moments_differ_by_their_rounding(found, ranks, name) -> None:
    optimizer = CASES[ranks][name]["trainer"]["optimizer"]
    rounding = 2.0**-8 if optimizer.get("main_grads_dtype", "float32") == "float32" else 0.05
    for seen in found[ranks, name]:
        assert seen["precise", "norm"] == pytest.approx(seen["plain", "norm"], rel=rounding)
        for number, plain in seen["plain", "state"].items():
            for key in KEYS[1:]:
                values = seen["precise", "state"][number][key]
                most = np.abs(plain[key]).max()
                assert np.abs(values - plain[key]).max() <= rounding * most, key


@each
def test_restored_as_it_was_saved_and_goes_on_alike(found, ranks, name) -> None:
    """float16 moments have a scale of their own, which reading computes again."""
    for seen in found[ranks, name]:
        if name == "mixed":
            for number, before in seen["precise", "state"].items():
                after = seen["precise", "precise"][number]
                assert np.array_equal(before["param"], after["param"])
                assert np.allclose(before["exp_avg"], after["exp_avg"], rtol=1e-6, atol=0)
            continue
        alike(seen["precise", "state"], seen["precise", "precise"])
        assert seen["precise", "precise", "went on"][0] == seen["precise", "went on"][0]
        alike(seen["precise", "went on"][1], seen["precise", "precise", "went on"][1])


@each
def test_either_reads_what_the_other_wrote(found, ranks, name) -> None:
    for seen in found[ranks, name]:
        alike(seen["precise", "state"], seen["precise", "plain"], KEYS)
        alike(seen["plain", "state"], seen["plain", "precise"], ("param",))
        if "lossless" in name:
            alike(seen["plain", "state"], seen["plain", "precise"], KEYS)


@pytest.mark.parametrize("optimizer", [LOSSLESS, BFLOAT16, MIXED], ids=["lossless", "bfloat16", "mixed"])
def test_offload_changes_no_bit_whole_and_in_bundles(model, optimizer) -> None:
    cases = {"whole": case(1, optimizer), "bundles": case(1, optimizer, offload_step_mb=1)}
    (seen,) = launch(
        "tests.te.adam_worker:offloaded",
        1,
        {"checkpoint": model, "cases": cases, "count": 2},
        timeout=600,
        bare=True,
    )
    for name in cases:
        assert seen[name, True] == seen[name, False], name


def test_saved_and_restored_from_every_state(model, tmp_path) -> None:
    arguments = {"checkpoint": model, "overrides": case(1, BFLOAT16), "folder": tmp_path}
    (seen,) = launch("tests.te.adam_worker:saved", 1, arguments, timeout=900, bare=True)
    expected = seen[""][0]
    assert all(went_on == expected for pair in seen.values() for went_on in pair)
