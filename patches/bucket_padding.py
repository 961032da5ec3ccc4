"""A distributed optimizer with several buckets saves a shifted state.

`get_parameter_state_dp_zero` leaves the padding between buckets out of the tensor it gathers, and
`sharded_param_state_fully_reshardable` cuts it by indices that count the padding. Tied embeddings always have a bucket
of their own under pipeline parallelism, so their master weights and moments are saved from the wrong place whenever the
bucket before does not end on the boundary (128 elements and a multiple of the data-parallel size).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from stare_megatron_patches import Patch, expect


def without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """`buffer.param_index_map` (parameter -> start, end, bucket), less the padding of the buckets before."""
    before, total = [], 0
    for bucket in buffer.buckets:
        before.append(total)
        total += bucket.grad_data.numel() - bucket.numel_unpadded
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def fix(module: ModuleType) -> None:
    """Show `sharded_param_state_fully_reshardable` the indices of the tensor that it cuts."""
    optimizer = module.DistributedOptimizer
    upstream = optimizer.sharded_param_state_fully_reshardable
    expect(upstream, "state_ten = world_tensors[state_key][param_world_start:param_world_end]")
    expect(upstream, ") in buffer.param_index_map.items():")
    expect(optimizer.get_parameter_state_dp_zero, "# gets rid of the padding between buckets.")

    @functools.wraps(upstream)
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = without_padding(buffer)
            return upstream(self, *args, **kwargs)
        finally:
            for buffer, indices in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = indices

    optimizer.sharded_param_state_fully_reshardable = sharded_param_state_fully_reshardable


PATCH = Patch(
    package="megatron-core",
    versions=">=0.16.1,<0.20",
    target="megatron.core.optimizer.distrib_optimizer",
    why="Optimizer state of tied embeddings under pipeline parallelism is saved from a shifted place.",
    upstream="https://github.com/NVIDIA/Megatron-LM/pull/5077 (merged 2026-05-31; 0.19.0 lacks it)",
    remove_when="the first version with that pull request is the oldest supported",
    cpu_only=False,
    fix=fix,
)
