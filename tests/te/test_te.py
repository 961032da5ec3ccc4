"""Transformer Engine's layers against the local ones, without a GPU: `make test-te`.

The real modules of the real package, built, loaded, exported and saved; nothing is computed with them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from launch import launch

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("needs the environment of `make test-te`", allow_module_level=True)

EXPERTS = list(checkpoints.EXPERTS)
DENSE = [*(n for n in checkpoints.FAMILIES if n not in EXPERTS), "r1_qwen", "qwen3_tied", "yarn"]
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one rank": {}},
    2: {
        "TP2": {"tensor_parallel": 2},
        "TP2 SP": {"tensor_parallel": 2, "sequence_parallel": True},
        "PP2": {"pipeline_parallel": 2},
        "PP2 VPP2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
        "CP2": {"context_parallel": 2},
        **{
            f"CP2 {kind}": {"context_parallel": 2, "megatron": {"cp_comm_type": kind}} for kind in ("all_gather", "a2a")
        },
    },
    4: {"TP2 PP2": {"tensor_parallel": 2, "pipeline_parallel": 2}},
}
WITH_EXPERTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"EP2": {"expert_parallel": 2}},
    4: {
        "TP2 SP EP2": {
            "tensor_parallel": 2,
            "sequence_parallel": True,
            "expert_parallel": 2,
            "megatron": {"expert_tensor_parallel_size": 1},
        }
    },
}
CASES = [
    (ranks, layout, family)
    for ranks in (1, 2, 4)
    for families, layouts in ((DENSE, LAYOUTS[ranks]), (EXPERTS, LAYOUTS[ranks] | WITH_EXPERTS.get(ranks, {})))
    for family in families
    for layout in layouts
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], list[dict[str, Any]]]:
    """What each rank found, by case."""
    from stare_megatron.__main__ import main

    folder = tmp_path_factory.mktemp("te")
    hf = {name: checkpoints.make(name, folder) for name in (*DENSE, *EXPERTS)}
    for name, path in hf.items():
        assert main(["convert", str(path), str(folder / f"{name}-mcore"), "--quiet"]) == 0
    seen: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for ranks in (1, 2, 4):
        cases = {
            f"{layout}/{family}": {
                "hf": str(hf[family]),
                "mcore": str(folder / f"{family}-mcore"),
                "trainer": (LAYOUTS[ranks] | WITH_EXPERTS.get(ranks, {}))[layout],
                "out": str(folder / f"{ranks}-{layout}-{family}"),
            }
            for number, layout, family in CASES
            if number == ranks
        }
        results = launch("tests.te.te_worker:run", ranks, {"cases": cases}, timeout=900, bare=True)
        for name in cases:
            layout, _, family = name.partition("/")
            seen[ranks, layout, family] = [result[name] for result in results]
    return seen


each = pytest.mark.parametrize(("ranks", "layout", "family"), CASES)


@each
def test_the_layers_are_those_of_transformer_engine(found, ranks, layout, family) -> None:
    for seen in found[ranks, layout, family]:
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"} <= set(
            seen["modules"]
        )
        assert ("TEColumnParallelGroupedLinear" in seen["modules"]) == (family in EXPERTS)


@each
def test_attention_communicates_as_asked(found, ranks, layout, family) -> None:
    """p2p is Transformer Engine's default where nothing is asked for, and upstream's."""
    asked = layout.removeprefix("CP2").strip() or "p2p"
    for seen in found[ranks, layout, family]:
        assert seen["communication"] == ([(asked, 2)] if layout.startswith("CP2") else [])


@each
def test_loaded_and_exported_bit_for_bit(found, ranks, layout, family) -> None:
    for seen in found[ranks, layout, family]:
        assert seen["exported"] == [[], []]


@each
def test_shapes_and_tensor_parallel_marks(found, ranks, layout, family) -> None:
    for seen in found[ranks, layout, family]:
        assert seen["marks"] == []


@each
def test_a_checkpoint_holds_the_same_tensors(found, ranks, layout, family) -> None:
    for seen in found[ranks, layout, family]:
        engine, local = seen["tensors"]
        assert engine == local


@each
def test_either_spec_loads_what_the_other_saved(found, ranks, layout, family) -> None:
    for seen in found[ranks, layout, family]:
        assert seen["saved by engine"] == seen["saved by local"] == []


@each
def test_a_converted_checkpoint_is_loaded(found, ranks, layout, family) -> None:
    for seen in found[ranks, layout, family]:
        assert seen["converted"] == []


def test_the_stand_in_has_no_kernels() -> None:
    import transformer_engine.pytorch  # noqa: F401 - which would load the extension
    import transformer_engine_torch as extension

    with pytest.raises(RuntimeError, match="no kernels"):
        extension.layernorm_fwd()


def test_the_folder_is_the_checkout() -> None:
    import stare_megatron

    assert Path(stare_megatron.__file__).parents[1] == Path(__file__).parents[2]
