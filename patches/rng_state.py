"""The model-parallel generator states are read and set through CUDA's generators."""

from __future__ import annotations

from types import ModuleType

import torch

from stare_megatron_patches import Patch, expect


def fix(module: ModuleType) -> None:
    """Let `megatron.core.tensor_parallel.random` switch the states of torch's CPU generator."""
    expect(module._get_cuda_rng_state, "return torch.cuda.random.get_rng_state(device=device)")
    expect(module._set_cuda_rng_state, "_lazy_call(cb)")

    def get_state(device: object = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module._get_cuda_rng_state = get_state  # pyright: ignore[reportAttributeAccessIssue]
    module._set_cuda_rng_state = set_state  # pyright: ignore[reportAttributeAccessIssue]


PATCH = Patch(
    package="megatron-core",
    versions=">=0.16.1,<0.20",
    target="megatron.core.tensor_parallel.random",
    why="CudaRNGStatesTracker.fork() and activation recomputation switch CUDA generator states only.",
    upstream="megatron/core/tensor_parallel/random.py: _get_cuda_rng_state, _set_cuda_rng_state",
    remove_when="the tracker takes the generator of the tensors' device",
    cpu_only=True,
    fix=fix,
)
