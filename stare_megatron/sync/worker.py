"""Runs inside vLLM's workers: checksums of the parameters a model computes with, by Hugging Face name.

vLLM fuses and shards what a checkpoint holds apart (qkv_proj, gate_up_proj), pads the vocabulary, and on CPUs keeps
linear weights only in a packed form: vLLM's own `compute_weight_checksums` digests those local tensors, which on a
CPU are empty, so it cannot be compared with a trainer's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from stare_megatron.sync.check import merge_shards, shard_sum
from stare_megatron.sync.load import abandon
from stare_megatron.sync.loaded import is_quantized, loaded_form, used_weight
from stare_megatron.sync.sharded_engine import ShardedWeightTransferEngine

Packed = Mapping[str, list[str]]


class Piece(NamedTuple):
    """A block of one parameter on this worker: `tensor` [rows, columns] at (`row`, `column`) of a matrix `width`
    wide. Workers with the same `shard` hold the same block. `stray`: of an LM head that is tied to an embedding and
    does not equal it."""

    name: str
    tensor: torch.Tensor
    row: int
    column: int
    width: int
    shard: int
    stray: bool = False


class ChecksumExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    model_runner: Any
    weight_transfer_engine: Any = None
    _weight_update_active: bool

    def stare_give_up_update(self, leave: bool = False) -> None:
        """Give up an update of weights that was begun and not finished, if there is one. Until the next is finished the
        model may have some weights of each. `leave`: close the connections with the trainer, too."""
        if leave and isinstance(self.weight_transfer_engine, ShardedWeightTransferEngine):
            self.weight_transfer_engine.shutdown()
        abandon(self.model_runner.get_model().modules())
        self._weight_update_active = False

    def stare_checksums(self, names: list[str]) -> dict[str, str]:
        """Parameter name -> checksum of the whole parameter; all workers make the call and return the same. `names`:
        which parameters; empty: all. A head that does not equal the embedding it is tied to is among them in any case.

        Covers linear layers, embeddings, LM heads, unsharded parameters and experts. Of boxes, by `sharded.label`,
        where pushes are sharded.
        """
        model = self.model_runner.get_model()
        if isinstance(self.weight_transfer_engine, ShardedWeightTransferEngine):
            strays = {p.name: (0, 0) for p in pieces(model, model.packed_modules_mapping, heads_only=True) if p.stray}
            return _merged({key: (0, value) for key, value in self.weight_transfer_engine.sums(names).items()} | strays)
        mine = {
            p.name: (p.shard, shard_sum(p.tensor, p.row, p.column, p.width))
            for p in pieces(model, model.packed_modules_mapping, experts=frozenset(names))
            if not names or p.name in names or p.stray
        }
        return _merged(mine)


def _merged(mine: dict[str, tuple[int, int]]) -> dict[str, str]:
    group = get_world_group()
    everyone: list[dict[str, tuple[int, int]]] = [{} for _ in range(group.world_size)]
    torch.distributed.all_gather_object(everyone, mine, group=group.cpu_group)
    return merge_shards(everyone)


@torch.no_grad()
def pieces(
    model: torch.nn.Module, packed: Packed, *, heads_only: bool = False, experts: Collection[str] = ()
) -> Iterator[Piece]:
    """Every parameter of `model` that can be told by a Hugging Face name and of which what was loaded can be told; of
    LM heads only, if so wanted. `experts`: of those of experts the ones of these names; empty: all."""
    embeddings: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            weight, tied = used_weight(module), id(module.weight) in embeddings
            if not tied or not torch.equal(weight, _stored(module)):
                yield from _embedding(path, module, weight, stray=tied)
        elif isinstance(module, VocabParallelEmbedding):
            embeddings.add(id(module.weight))
            if not heads_only:
                yield from _embedding(path, module, _stored(module))
        elif heads_only:
            continue
        elif is_quantized(module):
            continue  # the matrix that was sent is not kept
        elif isinstance(module, LinearBase):
            yield from _linear(path, module, packed)
        elif isinstance(module, RoutedExperts):
            yield from _experts(path, module, experts)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                matrix = _matrix(parameter)
                yield Piece(f"{path}.{name}", matrix, 0, 0, matrix.shape[1], 0)


def _embedding(path: str, module: Any, weight: torch.Tensor, *, stray: bool = False) -> Iterator[Piece]:
    where = module.shard_indices
    first, rows = where.org_vocab_start_index, where.org_vocab_end_index - where.org_vocab_start_index
    yield Piece(f"{path}.weight", weight[:rows], first, 0, module.embedding_dim, module.tp_rank, stray)


def _linear(path: str, module: Any, packed: Packed) -> Iterator[Piece]:
    tensors = {"weight": used_weight(module)}
    if module.bias is not None:
        tensors["bias"] = _matrix(module.bias)
    for kind, tensor in tensors.items():
        if isinstance(module, RowParallelLinear):
            if kind == "bias":
                yield Piece(f"{path}.bias", tensor, 0, 0, 1, 0)
            else:
                column = module.tp_rank * tensor.shape[1]
                yield Piece(f"{path}.weight", tensor, 0, column, module.input_size, module.tp_rank)
        elif isinstance(module, ColumnParallelLinear):
            yield from _columns(path, kind, module, tensor, packed)
        else:
            yield Piece(f"{path}.{kind}", tensor, 0, 0, tensor.shape[1], 0)


def _columns(path: str, kind: str, module: Any, tensor: torch.Tensor, packed: Packed) -> Iterator[Piece]:
    """Output-sharded, maybe several projections on top of each other."""
    parent, _, leaf = path.rpartition(".")
    names = [f"{parent}.{part}" for part in packed[leaf]] if leaf in packed else [path]
    shards = [module.tp_rank] * len(names)
    if isinstance(module, QKVParallelLinear):
        heads, kv = module.num_heads, module.num_kv_heads
        sizes = [heads * module.head_size, kv * module.head_size, kv * module.v_head_size]
        shards[1:] = [module.tp_rank // module.num_kv_head_replicas] * 2
    elif isinstance(module, MergedColumnParallelLinear):
        sizes = [size // module.tp_size for size in module.output_sizes]
    else:
        sizes = [tensor.shape[0]]
    if len(names) < len(sizes):
        return  # one matrix in the checkpoint, too (Phi-3): its rows here lie in several places of it
    for name, part, shard in zip(names, tensor.split(sizes), shards, strict=True):
        yield Piece(f"{name}.{kind}", part, shard * part.shape[0], 0, part.shape[1], shard)


def _experts(path: str, module: Any, names: Collection[str]) -> Iterator[Piece]:
    """Of each expert that this worker has. None where a kernel keeps them in a layout that is not known here."""
    gate_up, down = loaded_form(module, "w13_weight"), loaded_form(module, "w2_weight")
    if gate_up is None or down is None:
        return
    config, parent = module.moe_config, path.rpartition(".")[0]
    # A kernel may want more rows of each half, and columns of the other matrix, than the checkpoint has.
    size, half = config.intermediate_size_per_partition_unpadded, config.intermediate_size_per_partition
    inputs, shard = config.hidden_dim_unpadded, config.moe_parallel_config.tp_rank
    width = size * config.moe_parallel_config.tp_size
    parts = (
        (module.ckpt_gate_proj_name, gate_up, slice(0, size), slice(0, inputs)),
        (module.ckpt_up_proj_name, gate_up, slice(half, half + size), slice(0, inputs)),
        (module.ckpt_down_proj_name, down, slice(0, inputs), slice(0, size)),
    )
    for expert in range(config.num_logical_experts):
        i = module._map_global_expert_id_to_local_expert_id(expert)
        for kind, read, rows, columns in parts if i >= 0 else ():
            name = f"{parent}.{expert}.{kind}.weight"
            if names and name not in names:
                continue
            matrix = read((slice(i, i + 1), rows, columns))[0]
            if read is down:
                yield Piece(name, matrix, 0, shard * size, width, shard)
            else:
                yield Piece(name, matrix, shard * size, 0, inputs, shard)


def _stored(module: Any) -> torch.Tensor:
    return module.weight


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[0], -1)
