"""Every layout computes what one process computes: loss, gradient norm and updated weights of two optimizer steps.

The gradient convention (sums over ranks and micro-batches, divided by nothing: `trainer.model.PolicyConfig`) is what
makes the norm equal for 1, 2 and 4 data-parallel ranks and equal to transformers'.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import parity_worker
import pytest
from launch import free_port, launch
from parity_worker import Outcome

TP2 = {"tensor_parallel": 2}
PP2 = {"pipeline_parallel": 2}
CP2 = {"context_parallel": 2}
EP2 = {"expert_parallel": 2}
SP = {"sequence_parallel": True}
VPP2 = PP2 | {"virtual_pipeline": 2}
ETP1 = {"megatron": {"expert_tensor_parallel_size": 1}}

# One launch for each number of ranks: (family, [layouts]).
TWO_RANKS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", TP2),
    ("qwen2", PP2),
    ("qwen2", {}),
    ("qwen2", {"distributed_optimizer": False}),
    ("qwen3", TP2 | SP),
    ("qwen3", VPP2),
    ("qwen3", CP2),
    ("qwen3_moe", CP2),
    ("qwen3_moe", EP2),
    ("qwen3_moe", EP2 | TP2 | SP | ETP1),
    ("mistral", TP2 | SP),
    ("mixtral", EP2 | TP2 | SP | ETP1),
    ("phi3", TP2),
    ("qwen2_moe", TP2 | SP),
    ("qwen2_moe", EP2 | TP2 | SP | ETP1),
    ("qwen2_moe", EP2 | {"recompute": "selective", "recompute_modules": ["shared_experts"]}),
]
FOUR_RANKS: list[tuple[str, dict[str, Any]]] = [("qwen2", TP2 | PP2), ("qwen2", {})]
SLOW_TWO_RANKS: list[tuple[str, dict[str, Any]]] = [
    ("llama3", TP2),
    ("llama3", VPP2),
    ("llama", TP2 | SP),
    ("llama", CP2),
    ("qwen2", CP2),
    ("qwen2", VPP2),
    ("qwen2", PP2 | {"distributed_optimizer": False}),
    ("qwen3", TP2),
    ("qwen3_moe", TP2 | SP),
    ("qwen3_moe", VPP2),
    ("qwen3", TP2 | {"recompute": "selective"}),
    ("qwen3", TP2 | {"recompute": "selective", "recompute_modules": ["mlp", "core_attn"]}),
    ("qwen3_moe", EP2 | {"recompute": "selective"}),
    ("qwen3", PP2 | {"recompute": "full"}),
    ("mistral", VPP2),
    ("mistral", CP2),
    ("mixtral", EP2),
    ("mixtral", CP2),
    ("mixtral", VPP2),
    ("phi3", VPP2),
    ("phi3", CP2),
    ("qwen2_moe", EP2),
    ("qwen2_moe", CP2),
    ("qwen2_moe", VPP2),
    ("qwen2_moe", EP2 | {"recompute": "selective"}),
]
SLOW_FOUR_RANKS: list[tuple[str, dict[str, Any]]] = [
    ("llama3", TP2 | VPP2 | SP),
    ("llama3", TP2 | CP2 | SP),
    ("llama3", {"pipeline_parallel": 4}),
    ("qwen2", PP2 | CP2),
    ("qwen2", TP2),
    ("qwen3_moe", PP2 | EP2),
    ("qwen3_moe", EP2),
    ("qwen3_moe", TP2 | SP | EP2 | ETP1),
    ("mixtral", PP2 | EP2),
    ("mistral", TP2 | PP2),
    ("phi3", TP2 | VPP2 | SP),
    ("qwen2_moe", PP2 | EP2),
    ("qwen2_moe", TP2 | SP | EP2 | ETP1),
    ("llama", {"context_parallel": 4}),
]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="checkpoints-")


@functools.cache
def checkpoint(family: str) -> Path:
    return checkpoints.make(family, Path(_folder().name))


def outcomes(cases: list[tuple[str, dict[str, Any]]], ranks: int, **more: Any) -> list[list[Outcome]]:
    """By case, then by rank."""
    arguments = [
        {"path": str(checkpoint(family)), "port": free_port(), "trainer": layout} | more for family, layout in cases
    ]
    by_rank = launch("parity_worker:run", ranks, {"cases": arguments})
    return [list(column) for column in zip(*by_rank, strict=True)]


@functools.cache
def alone() -> dict[str, Outcome]:
    """The single process, for every family."""
    cases: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in checkpoints.FAMILIES]
    return {family: ranks[0] for (family, _), ranks in zip(cases, outcomes(cases, 1), strict=True)}


def compare(cases: list[tuple[str, dict[str, Any]]], ranks: int) -> None:
    for (family, layout), results in zip(cases, outcomes(cases, ranks), strict=True):
        where, one = f"{family} {layout} on {ranks} ranks", alone()[family]
        for rank, got in enumerate(results):
            assert got.exact, f"{where}: rank {rank}: load and export changed the weights"
            assert got.names == one.names, f"{where}: rank {rank}: names or their order"
            assert got.losses[0] == pytest.approx(one.losses[0], abs=1e-5), where
            # Adam's first step is nearly the gradient's sign: rounding of gradients near 0 comes back enlarged.
            assert got.losses[1] == pytest.approx(one.losses[1], abs=5e-5), where
            assert got.grad_norms == pytest.approx(one.grad_norms, rel=1e-4), where
        for name, weight in one.weights.items():
            # For the same reason the mean is what tells, not the largest difference.
            assert (results[0].weights[name] - weight).abs().mean() < 1e-5, f"{where}: {name} after two steps"


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_one_process_is_transformers(family: str) -> None:
    loss, grad_norm = parity_worker.reference(checkpoint(family))
    one = alone()[family]
    assert one.exact
    assert one.losses[0] == pytest.approx(loss, abs=1e-5)
    assert one.grad_norms[0] == pytest.approx(grad_norm, rel=1e-5)
    assert one.losses[1] < one.losses[0] - 0.1, "the step did not help"


def test_two_ranks() -> None:
    compare(TWO_RANKS, 2)


def test_four_ranks() -> None:
    compare(FOUR_RANKS, 4)


@pytest.mark.slow
def test_two_ranks_wide() -> None:
    compare(SLOW_TWO_RANKS, 2)


@pytest.mark.slow
def test_four_ranks_wide() -> None:
    compare(SLOW_FOUR_RANKS, 4)


@pytest.mark.slow
def test_bfloat16() -> None:
    """bfloat16 with float32 master weights and gradients: layouts agree to its rounding."""
    cases: list[tuple[str, dict[str, Any]]] = [("qwen2", TP2), ("qwen2", PP2), ("qwen2", {})]
    one = outcomes([("qwen2", {})], 1, dtype="bfloat16")[0][0]
    for (_, layout), results in zip(cases, outcomes(cases, 2, dtype="bfloat16"), strict=True):
        assert results[0].exact
        assert results[0].losses == pytest.approx(one.losses, abs=2e-2), layout
        assert results[0].grad_norms == pytest.approx(one.grad_norms, rel=2e-2), layout
