"""A distributed optimizer's state for saving, without gathering it where one rank has all of it.

Upstream copies the state into buffers, gathers these over the data-parallel ranks and cuts them into parameters. With
one data-parallel rank the parts that come out are the tensors that went in.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_KEYS = ("param", "exp_avg", "exp_avg_sq")


class _Pieces:
    """Looks like the flat tensor that upstream cuts, and gives for each of its cuts the tensor that is meant."""

    def __init__(self, by_start: dict[int, torch.Tensor]) -> None:
        self._by_start = by_start

    def __getitem__(self, cut: slice) -> torch.Tensor:
        piece = self._by_start[cut.start]
        if piece.numel() != cut.stop - cut.start:
            raise RuntimeError(f"optimizer state of {piece.numel()} elements where {cut.stop - cut.start} belong")
        return piece


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers an optimizer is made of."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


@contextlib.contextmanager
def local_state(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While this lasts, `sharded_state_dict(is_loading=False)` neither gathers nor copies what this rank has alone."""
    # Upstream collects garbage in the middle: not through everything that was ever imported.
    gc.freeze()
    changed = []
    try:
        for part in parts(optimizer):
            if isinstance(part, DistributedOptimizer) and part.data_parallel_group.size() == 1:
                part.get_parameter_state_dp_zero = _state_of(part)
                changed.append(part)
        yield
    finally:
        for part in changed:
            del part.get_parameter_state_dp_zero
        gc.unfreeze()


def _state_of(part: Any) -> Any:
    def get_parameter_state_dp_zero(**_: Any) -> dict[Any, Any]:
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for number, ranges in enumerate(part.gbuf_ranges):
            ((dtype, _),) = ranges.items()
            pieces: dict[str, dict[int, torch.Tensor]] = {key: {} for key in _KEYS}
            for parameter, (start, _, _) in part.buffers[number].param_index_map.items():
                tensors = part._get_main_param_and_optimizer_states(parameter)
                for key in _KEYS:
                    pieces[key][start] = tensors[key].detach().float().view(-1)
            state[number] = {dtype: {key: _Pieces(by_start) for key, by_start in pieces.items()}}
        return state

    return get_parameter_state_dp_zero


def live_storages(optimizer: MegatronOptimizer, parameters: Iterator[torch.nn.Parameter]) -> set[int]:
    """Addresses of the memory that the next step changes."""
    tensors = [parameter.data for parameter in parameters]
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            tensors += group["params"]
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
