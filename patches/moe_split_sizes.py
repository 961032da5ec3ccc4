"""All-to-all split sizes stay tensors on a CPU, where torch.distributed wants lists of ints."""

from __future__ import annotations

from types import ModuleType

import torch

from stare_megatron_patches import Patch, expect


def fix(module: ModuleType) -> None:
    """Convert CPU tensors too."""
    expect(module.maybe_move_tensor_to_cpu, "if torch.is_tensor(tensor) and tensor.is_cuda:")

    def maybe_move_tensor_to_cpu(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # pyright: ignore[reportAttributeAccessIssue]


PATCH = Patch(
    package="megatron-core",
    versions=">=0.16.1,<0.20",
    target="megatron.core.transformer.moe.moe_utils",
    why="TypeError: all_to_all_single() takes no tensor as a list of sizes.",
    upstream="megatron/core/transformer/moe/moe_utils.py: maybe_move_tensor_to_cpu",
    remove_when="as_numpy is honoured for tensors already on the CPU",
    cpu_only=True,
    fix=fix,
)
