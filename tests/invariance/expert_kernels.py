"""Experts kept as vLLM's kernels for GPUs keep them, in workers on a CPU, which cannot compute with them: vLLM's own
`process_weights_after_loading`, its own conversions, which are plain torch, and what they keep.

Of FlashInfer, which is not installed beside a CPU build, two functions are stood in for that say in which order a
kernel wants rows: here any order, another for each number of rows.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

TRITON, CUTLASS, TENSORRT = "TRITON", "FLASHINFER_CUTLASS", "FLASHINFER_TRTLLM"


def install(kernel: str) -> None:
    """Models that this process makes from now on choose `kernel` for their experts."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, backend_to_kernel_cls

    backend = UnquantizedMoeBackend[kernel]
    chosen = backend, backend_to_kernel_cls(backend)[0]
    patches = pytest.MonkeyPatch()
    patches.setattr(method, "select_unquantized_moe_backend", lambda moe_config: chosen)
    core = ModuleType("flashinfer.fused_moe.core")
    vars(core).update(
        _maybe_get_cached_w3_w1_permute_indices=lambda cache, matrix, tile, is_gated_act_gemm: _order(matrix, 1),
        get_w2_permute_indices_with_cache=lambda cache, matrix, tile: _order(matrix, 2),
    )
    for module in (ModuleType("flashinfer"), ModuleType("flashinfer.fused_moe"), core):
        patches.setitem(sys.modules, module.__name__, module)


def _order(matrix: Any, which: int) -> Any:
    import torch

    rows = matrix.shape[0]
    return torch.randperm(rows, generator=torch.Generator().manual_seed(3 * rows + which))


def _experts(worker: Any) -> list[Any]:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return [module for module in worker.model_runner.get_model().modules() if isinstance(module, RoutedExperts)]


def in_use(worker: Any) -> set[str]:
    """The kernels that the worker's experts are kept for."""
    return {module.quant_method.unquantized_backend.name for module in _experts(worker)}


def swap_experts(worker: Any, parameter: str, one: int, other: int) -> None:
    """In what the kernel of layer 1 computes with, exchange two of this worker's experts."""
    kept = getattr(_experts(worker)[1], parameter).data
    kept[[one, other]] = kept[[other, one]]


def turn_expert_map(worker: Any, by: int) -> None:
    """Let layer 1 take every expert for another one."""
    manager = _experts(worker)[1].expert_map_manager
    manager._expert_map = manager._expert_map.roll(by)
