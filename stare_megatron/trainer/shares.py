"""A rank's share of model and optimizer, as blocks of the tensors that a distributed checkpoint stores.

A distributed optimizer gives each of its ranks a range of every buffer of parameters: of a parameter the elements
[start, stop) in memory order, or none. Upstream's format `fully_reshardable` stores whole parameters, for which it
gathers the ranges on saving and reads everything on loading. A range is a few blocks of the parameter, though, and a
distributed checkpoint takes blocks of any extent: here each rank writes those of its range from where they are, and
reads them to where they belong. Names, shapes and dtypes are the format's, and so any layout reads what any wrote.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from stare_megatron.trainer import precise

_KEYS = ("param", "exp_avg", "exp_avg_sq")


class Block(NamedTuple):
    """A block of a tensor: where it begins and its extent, by dimension; `first`: of its elements, in memory order."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int


def blocks(shape: Sequence[int], start: int, stop: int) -> Iterator[Block]:
    """The elements [start, stop) of a tensor of `shape` in memory order, as blocks that are contiguous there: at most
    two less than twice its dimensions, and one."""
    if start >= stop:
        return
    row = math.prod(shape[1:])
    if len(shape) < 2 or row == 1:
        yield Block((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]), start)
        return
    first, last = -(-start // row), stop // row  # the rows that are in it whole

    def within(number: int, low: int, high: int) -> Iterator[Block]:
        for block in blocks(shape[1:], low - number * row, high - number * row):
            yield Block((number, *block.offsets), (1, *block.sizes), number * row + block.first)

    if first > last:
        yield from within(last, start, stop)
        return
    if start < first * row:
        yield from within(first - 1, start, first * row)
    if first < last:
        yield Block((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row)
    if last * row < stop:
        yield from within(last, last * row, stop)


def share(
    whole: ShardedTensor | ShardedTensorFactory, key: str, values_N: torch.Tensor, start: int
) -> list[ShardedTensor]:
    """A range of a parameter as pieces of a checkpoint, which share memory with `values_N`.

    `whole`: the parameter as Megatron-Core describes it to checkpoints, or what stands for it there: a moment, say.
    `key`: put before its name. `values_N`: the elements from `start` on of the parameter in memory order, [n].
    """
    described: Any = [whole] if isinstance(whole, ShardedTensor) else nested_values(whole.build())
    parameter: Any = whole.data
    stop, found = start + values_N.numel(), []
    for part in described:
        low = part.data.storage_offset() - parameter.storage_offset()
        same = part.data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        if not (same and part.data.is_contiguous() and parameter.is_contiguous()):
            raise RuntimeError(f"{part.key} is stored in another order than it has in memory")
        extra = part.prepend_axis_num  # axes of the stored tensor that this one has not, such as the layer's number
        for block in blocks(part.local_shape, max(start - low, 0), min(stop - low, part.data.numel())):
            sizes = (1,) * extra + block.sizes
            offsets = (0,) * extra + block.offsets
            first = low + block.first - start
            data = values_N[first : first + math.prod(sizes)].view(sizes)
            found.append(
                ShardedTensor(
                    key=key + part.key,
                    data=data,
                    dtype=data.dtype,
                    local_shape=sizes,
                    global_shape=part.global_shape,
                    global_offset=tuple(a + b for a, b in zip(part.global_offset, offsets, strict=True)),
                    axis_fragmentations=None,  # the blocks are of any extent
                    replica_id=(*part.replica_id[:2], 0),  # of the data-parallel ranks no other has it
                    allow_shape_mismatch=part.allow_shape_mismatch,
                )
            )
    return found


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers an optimizer is made of."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def split(model: dict[str, Any], optimizer: MegatronOptimizer) -> dict[str, list[ShardedTensor]]:
    """Take the parameters that a distributed optimizer splits over its ranks out of the sharded state dict of a chunk;
    returns, by their names there, what of them is this rank's share: nothing, for some."""
    ranges = {p: (start, stop) for part in parts(optimizer) for p, start, stop in _ranges(part)}
    found: dict[str, list[ShardedTensor]] = {}
    for name in [name for name, value in model.items() if _is_tensor(value) and value.data in ranges]:
        whole = model.pop(name)
        start, stop = ranges[whole.data]
        found[name] = share(whole, "", whole.data.detach().view(-1)[start:stop], start)
    return found


@contextlib.contextmanager
def in_place(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While this lasts, `optimizer.sharded_state_dict` gives this rank's share of the state from where it is, and
    loading reads it to there, after which `optimizer.load_state_dict` has no tensor to place."""
    # Upstream collects garbage in the middle: not through everything that was ever imported.
    gc.freeze()
    changed = []
    try:
        with contextlib.ExitStack() as stack:
            for part in parts(optimizer):
                if isinstance(part, DistributedOptimizer):
                    state = _State(part)
                    part.sharded_param_state_fully_reshardable = state.sharded
                    part.load_parameter_state_from_fully_reshardable = state.loaded
                    changed.append(part)
                if precise.is_precise(part):
                    stack.enter_context(precise.by_reference(part))
            yield
    finally:
        for part in changed:
            del part.sharded_param_state_fully_reshardable, part.load_parameter_state_from_fully_reshardable
        gc.unfreeze()


class _State:
    """Stands in for two methods of a distributed optimizer."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self._read = precise.read if precise.is_precise(part) else _references
        self._given: dict[Any, dict[str, torch.Tensor]] = {}

    def sharded(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[int, Any]:
        """For `sharded_param_state_fully_reshardable`."""
        wholes = {value.data: value for value in nested_values(model_sharded_state_dict) if _is_tensor(value)}
        found: dict[int, Any] = {}
        for number, (parameter, start, stop) in enumerate(_ranges(self._part)):
            if start == stop:
                continue
            tensors = self._read(self._part, parameter)
            given = {key: tensors[key].detach().float().view(-1) for key in _KEYS}
            if any(values.numel() != stop - start for values in given.values()):
                raise RuntimeError(f"optimizer state of other than the {stop - start} elements that belong here")
            found[number] = {
                key: share(wholes[parameter], f"optimizer.state.{key}.", values, start) for key, values in given.items()
            }
            self._given[parameter] = given
        return found

    def loaded(self, state_dict: dict[int, Any]) -> None:
        """For `load_parameter_state_from_fully_reshardable`. What `sharded` gave has been filled, and is the state
        itself unless the optimizer keeps that in another form."""
        for parameter, given in self._given.items():
            if precise.is_precise(self._part):
                precise.write(self._part, parameter, given)
                continue
            now = self._part._get_main_param_and_optimizer_states(parameter)
            if any(now[key].data_ptr() != values.data_ptr() for key, values in given.items()):
                self._part._set_main_param_and_optimizer_states(parameter, now | given)


def _references(part: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    return part._get_main_param_and_optimizer_states(parameter)


def gather_parameters(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Give every rank the parameters whole, of which each has its range, as after an optimizer step. A collective."""
    if any(isinstance(part, DistributedOptimizer) for part in parts(optimizer)):
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, ShardedTensor | ShardedTensorFactory)


def _ranges(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Every parameter of an optimizer that splits them, and the range of it that this rank has; else nothing."""
    if not isinstance(part, DistributedOptimizer):
        return
    for number, by_dtype in enumerate(part.gbuf_ranges):
        mine = {
            p: r["param"] for buckets in by_dtype.values() for bucket in buckets for p, r in bucket["param_map"].items()
        }
        for parameter in part.buffers[number].param_index_map:
            here = mine.get(parameter)
            yield (parameter, here.start, here.end) if here is not None else (parameter, 0, 0)


def live_storages(optimizer: MegatronOptimizer, parameters: Iterator[torch.nn.Parameter]) -> set[int]:
    """Addresses of the memory that the next step changes."""
    tensors = [parameter.data for parameter in parameters]
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            tensors += group["params"]
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
