"""Loading a Hugging Face checkpoint into Megatron-Core chunks, and exporting them again under the same names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.utils import get_model_config
from torch.distributed import ProcessGroup

from stare_megatron.models.boxes import Box, held
from stare_megatron.models.entries import ParameterEntry, entries, hf_names, local_entries
from stare_megatron.models.shape import ModelShape, Split
from stare_megatron.models.shards import Checkpoint, merge, read_shard
from stare_megatron.models.weights import check_names
from stare_megatron.trainer.parallel import ep_group, etp_group, pp_group, tp_group


def _shape(chunks: Sequence[torch.nn.Module]) -> ModelShape:
    return get_model_config(chunks[0]).shape


class _Local:
    """The parameters on this rank, by global layer and Megatron-Core name."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters: dict[tuple[int | None, str], torch.nn.Parameter] = {}
        for chunk in chunks:
            model: Any = chunk
            while not hasattr(model, "decoder"):
                model = model.module
            globals_ = [layer.layer_number - 1 for layer in model.decoder.layers]
            for name, parameter in model.named_parameters():
                parts = name.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    self._parameters[globals_[int(parts[2])], ".".join(parts[3:])] = parameter
                else:
                    self._parameters[None, name] = parameter

    def find(self, entry: ParameterEntry, expert: int = 0) -> torch.nn.Parameter | None:
        """`expert`: its number on this rank."""
        for name in (entry.tensor.local, entry.tensor.fused):
            found = name and self._parameters.get((entry.layer, name.format(e=expert)))
            if isinstance(found, torch.nn.Parameter):
                return found
        return None

    def keys(self) -> set[tuple[int | None, str]]:
        return set(self._parameters)

    def key_of(self, parameter: torch.nn.Parameter) -> tuple[int | None, str]:
        return next(key for key, p in self._parameters.items() if p is parameter)


def _groups(entry: ParameterEntry) -> ProcessGroup:
    """The ranks that split this parameter (each expert, for experts)."""
    if entry.of_experts:
        return etp_group()
    return tp_group()


def _local_experts(shape: ModelShape, entry: ParameterEntry) -> range:
    """Numbers of the experts on this rank; one pseudo-expert where there are none."""
    if not entry.of_experts:
        return range(1)
    assert shape.experts is not None
    ranks, rank = parallel_state.get_expert_model_parallel_world_size(), parallel_state.get_expert_model_parallel_rank()
    here = shape.experts.number // ranks
    return range(rank * here, (rank + 1) * here)


def mark_split(chunks: Sequence[torch.nn.Module]) -> None:
    """Mark the parameters that tensor-parallel ranks split, so that the gradient norm counts every slice once.

    Upstream marks them while it draws initial values, which is skipped here. Before the optimizer is made.
    """
    shape, local = _shape(chunks), _Local(chunks)
    for entry in local_entries(shape):
        if entry.tensor.layout is Split.REPLICATED:
            continue
        dimension = 1 if entry.tensor.layout in (Split.ROW, Split.EXPERT_ROW) else 0
        for here in range(len(_local_experts(shape, entry))):
            parameter = local.find(entry, here)
            if parameter is not None:
                for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                    vars(parameter).pop(name, None)
                set_tensor_model_parallel_attributes(parameter, True, dimension, 1)


@torch.no_grad()
def load_weights(chunks: Sequence[torch.nn.Module], path: Path) -> None:
    """Fill every parameter of this rank from the checkpoint in folder `path`, reading only this rank's slices.

    `chunks`: wrapped in DistributedDataParallel or not; an optimizer with master weights must be told afterwards.

    Raises:
        UserError: a tensor is missing, has another shape, or is none of the architecture's.
        RuntimeError: a parameter that the architecture's table does not know.
    """
    shape, local, file = _shape(chunks), _Local(chunks), Checkpoint(path)
    check_names(path, file.headers, shape)
    left = local.keys()
    for entry in local_entries(shape):
        group = _groups(entry)
        for here, expert in enumerate(_local_experts(shape, entry)):
            parameter = local.find(entry, here)
            if parameter is None:
                continue
            rows = parameter.shape[0]
            value = read_shard(file, entry.tensor, entry.names(expert), shape, group.rank(), group.size(), rows)
            parameter.copy_(value)
            left.discard(local.key_of(parameter))
    if left:
        raise RuntimeError(f"parameters without a counterpart in the checkpoint: {sorted(map(str, left))}")


def metadata(shape: ModelShape, dtype: torch.dtype) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and full shape of everything `export` yields, in its order; no communication."""
    return [(name, dtype, want) for name, want in hf_names(shape).items()]


@torch.no_grad()
def export(chunks: Sequence[torch.nn.Module], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor, whole, in `dtype`, contiguous, on the model's device, without padding rows.

    A collective: all ranks must run through it. Names and order are the same on every rank. One parameter (or one
    layer's experts) is held at a time.
    """
    shape, local = _shape(chunks), _Local(chunks)
    device = next(chunks[0].parameters()).device
    for entry, owner in zip(entries(shape), _owners(local, shape), strict=True):
        wants = entry.wants(shape)
        mine = owner == parallel_state.get_pipeline_model_parallel_rank()
        if mine:
            stacks = _gather(local, entry, shape, dtype)
        else:
            number = entry.experts(shape)
            stacks = [torch.empty((number, *want), dtype=dtype, device=device) for want in wants]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            for stack in stacks:
                torch.distributed.broadcast(stack, group_src=owner, group=pp_group())
        for expert in range(len(stacks[0])):
            for name, stack in zip(entry.names(expert), stacks, strict=True):
                yield name, stack[expert]


@torch.no_grad()
def holdings(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[Box, torch.Tensor]]:
    """What this rank holds of the Hugging Face tensors: blocks and views of its parameters of the same shape, in the
    same order each time. No communication, no copy; padding is left out. Of tied embeddings the first stage's."""
    shape, local = _shape(chunks), _Local(chunks)
    for entry in entries(shape):
        group = _groups(entry)
        for here, expert in enumerate(_local_experts(shape, entry)):
            parameter = local.find(entry, here)
            if parameter is not None:
                for part in held(entry, shape, expert, group.rank(), group.size(), parameter.shape[0]):
                    yield part.box, parameter.detach()[part.where]


def _owners(local: _Local, shape: ModelShape) -> list[int]:
    """Pipeline rank that holds each entry; the first one, where several do."""
    here = [local.find(entry) is not None for entry in entries(shape)]
    everywhere: list[list[bool]] = [[]] * pp_group().size()
    torch.distributed.all_gather_object(everywhere, here, group=pp_group())
    return [column.index(True) for column in zip(*everywhere, strict=True)]


def _gather(local: _Local, entry: ParameterEntry, shape: ModelShape, dtype: torch.dtype) -> list[torch.Tensor]:
    """The whole tensors of a parameter of this stage, each [experts or 1, ...]."""
    shards = []
    for expert in range(len(_local_experts(shape, entry))):
        parameter = local.find(entry, expert)
        assert parameter is not None
        shards.append(parameter.detach().to(dtype))
    group = _groups(entry)
    if entry.tensor.layout is Split.REPLICATED or group.size() == 1:
        stacks = [torch.stack(shards)]
    else:
        stacks = _all_gather(torch.stack(shards), group)
    whole = [merge(entry.tensor, [s[e] for s in stacks], shape) for e in range(len(shards))]
    tensors = [torch.stack(column).contiguous() for column in zip(*whole, strict=True)]
    if entry.of_experts and ep_group().size() > 1:
        tensors = [torch.cat(_all_gather(t, ep_group())) for t in tensors]
    return tensors


def _all_gather(tensor: torch.Tensor, group: ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor, group=group)
    return parts
