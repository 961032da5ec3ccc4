"""Parameters and optimizer state of each trainer rank, exactly as Megatron-Core lays them out. No torch.

Source: megatron/core/distributed/param_and_grad_buffer.py (one buffer a chunk and a kind of parameter, filled from the
last parameter to the first) and optimizer/distrib_optimizer.py (each data-parallel rank owns an equal piece of every
bucket). Held to real ranks by tests/invariance/test_plan_layouts.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stare_megatron.config import OptimizerConfig, TrainerConfig
from stare_megatron.models.entries import full_shapes
from stare_megatron.models.families import FAMILIES
from stare_megatron.models.layout import element_bytes, padded_vocab
from stare_megatron.models.shape import ModelShape, Split

_PLAIN = OptimizerConfig()
# Elements: where a parameter may begin in a buffer, and of what a bucket's size is a multiple beside DP.
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128
# The order in which Megatron-Core's local layer registers its parts, the shared expert's after those here and the other
# experts; Transformer Engine's differs in the norms' places,
# which moves what a rank owns by at most an alignment.
_ORDER = ("input_layernorm", "linear_proj", "linear_qkv", "q_layernorm", "k_layernorm", "pre_mlp", "router")
_AFTER = ("shared_experts.gate_weight", "shared_experts.linear_fc1", "shared_experts.linear_fc2")


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups that split a model and its batches. `experts`: ranks that split one expert, `sharded`: the
    optimizer's state is split over data-parallel ranks."""

    world: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    sequence_parallel: bool
    sharded: bool

    @classmethod
    def of(cls, t: TrainerConfig) -> Layout:
        return cls(
            world=t.world_size,
            tensor=t.tensor_parallel,
            pipeline=t.pipeline_parallel,
            virtual=t.virtual_pipeline,
            context=t.context_parallel,
            expert=t.expert_parallel,
            expert_tensor=t.expert_tensor_parallel,
            sequence_parallel=t.sequence_parallel,
            sharded=t.distributed_optimizer,
        )

    @property
    def data(self) -> int:
        """Ranks that hold the same dense parameters and train on different sequences."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense parameters: of data and context parallelism."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.world // (self.pipeline * self.expert * self.expert_tensor))


@dataclass(frozen=True)
class Bucket:
    """Parameters that are reduced together, in the order of their places; all counts in elements.

    `replicas`: ranks that share it; `size`: with padding, of the buffers of gradients and parameters.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    size: int
    replicas: int

    @property
    def parameters(self) -> int:
        return sum(self.counts)

    def owned(self, replica: int) -> int:
        """Elements whose optimizer state is `replica`'s where it is split."""
        piece = self.size // self.replicas
        low, high = replica * piece, (replica + 1) * piece
        return sum(max(0, min(start + n, high) - max(start, low)) for start, n in self.places)

    @property
    def places(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, self.counts, strict=True))


@dataclass(frozen=True)
class Held:
    """What a rank holds from its first optimizer step on. Elements: `parameters` of its own, `buffer` with padding,
    `owned` those whose optimizer state it has."""

    parameters: int
    buffer: int
    owned: int

    def state(self, dtype: str, *, sharded: bool, adam: OptimizerConfig = _PLAIN) -> StateBytes:
        """In bytes, for parameters of `dtype`. The distributed optimizer keeps parameters in a padded buffer too."""
        weight = element_bytes(dtype)
        moments = (adam.exp_avg_dtype, adam.exp_avg_sq_dtype)
        # Transformer Engine's Adam works in float32, on copies unless both moments are of bfloat16 (fused_adam.py).
        copied = 0 if moments == ("bfloat16", "bfloat16") else 4 * sum(name != "float32" for name in moments)
        return StateBytes(
            parameters=weight * (self.buffer if sharded else self.parameters),
            gradients=element_bytes(adam.main_grads_dtype) * self.buffer,
            master=master_bytes(dtype, adam) * self.owned,
            moments=sum(map(element_bytes, moments)) * self.owned,
            copied=copied * self.owned,
        )


def master_bytes(dtype: str, adam: OptimizerConfig) -> int:
    """Of a master weight of a parameter of `dtype`; of a bfloat16 one its lower half, where only that is kept."""
    if dtype == "float32":
        return 0
    return 2 if adam.precision_aware and dtype == "bfloat16" else 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes of parameters, gradients, master weights and Adam's two moments; `copied`: of the moments once more, in
    float32, while Adam works."""

    parameters: int
    gradients: int
    master: int
    moments: int
    copied: int = 0

    @property
    def optimizer(self) -> int:
        return self.master + self.moments

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class LayerCounts:
    """Elements of a layer's parameters on one rank, in the order of registration: dense ones, its experts', and those
    of the expert that is shared, which are dense ones, too."""

    dense: tuple[int, ...]
    experts: tuple[int, ...]
    shared: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def layer_counts(shape: ModelShape, layout: Layout) -> LayerCounts:
    """Of any layer."""
    dense: list[tuple[int, int]] = []
    shared: list[tuple[int, int]] = []
    experts: list[int] = []
    for tensor in FAMILIES[shape.family].layer(shape):
        whole = sum(math.prod(want) for want in full_shapes(tensor, shape))
        if tensor.layout in (Split.EXPERT_GATED, Split.EXPERT_ROW):
            experts.append(whole // layout.expert_tensor)
            continue
        order, found = (_AFTER, shared) if "shared_experts" in tensor.local else (_ORDER, dense)
        place = next((i for i, part in enumerate(order) if part in tensor.local), len(order))
        found.append((place, whole // (1 if tensor.layout is Split.REPLICATED else layout.tensor)))
    local = shape.experts.number // layout.expert if shape.experts else 0
    ordered = [tuple(n for _, n in sorted(found, key=lambda pair: pair[0])) for found in (dense, shared)]
    return LayerCounts(ordered[0], tuple(experts) * local, ordered[1])


def _bucket(counts: Sequence[int], replicas: int, sharded: bool) -> Bucket:
    """`counts`: in the order of registration; the buffer is filled from the last one."""
    starts, end = [], 0
    for n in reversed(counts):
        start = -(-end // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT if sharded else end
        starts.append(start)
        end = start + n
    multiple = math.lcm(replicas, _BUCKET_ALIGNMENT) if sharded else 1
    return Bucket(tuple(starts), tuple(reversed(counts)), -(-end // multiple) * multiple, replicas)


def buckets(shape: ModelShape, layout: Layout, stage: int) -> list[Bucket]:
    """Of all chunks of a rank in pipeline stage `stage` (from 0)."""
    counts = layer_counts(shape, layout)
    # Without expert parallelism Megatron-Core counts experts among the dense parameters.
    apart = layout.expert > 1
    layers = shape.layers // (layout.pipeline * layout.virtual)
    found: list[Bucket] = []
    for chunk in range(layout.virtual):
        first = stage == 0 and chunk == 0
        last = stage == layout.pipeline - 1 and chunk == layout.virtual - 1
        rows = padded_vocab(shape.vocab, layout.tensor) // layout.tensor
        vocabulary = rows * shape.hidden
        # A tied embedding and its copy on the last stage have a bucket of their own under the distributed optimizer.
        shared = shape.tied and first != last
        each = counts.dense + (() if apart else counts.experts) + counts.shared
        body = [*each] * layers + [shape.hidden] * last
        separate = shared and layout.sharded
        before = [vocabulary] * (first and not separate)
        after = [vocabulary] * (last and (not shape.tied or shared) and not separate)
        parts = [[vocabulary]] * separate + [[*before, *body, *after]]
        found += [_bucket(part, layout.replicas, layout.sharded) for part in parts if part]
        if apart and counts.experts:
            found.append(_bucket(counts.experts * layers, layout.expert_replicas, layout.sharded))
    return found


def held(shape: ModelShape, layout: Layout, rank: int) -> Held:
    """What global rank `rank` holds. Raises: ValueError: no such rank."""
    if not 0 <= rank < layout.world:
        raise ValueError(f"rank {rank} of {layout.world}")
    place, stage = rank % (layout.world // layout.pipeline), rank // (layout.world // layout.pipeline)
    dense, expert = place // layout.tensor, place // (layout.expert_tensor * layout.expert)
    found = buckets(shape, layout, stage)
    apart = _expert_buckets(shape, layout, found)
    owned = [b.owned(expert if i in apart else dense) if layout.sharded else b.parameters for i, b in enumerate(found)]
    return Held(sum(b.parameters for b in found), sum(b.size for b in found), sum(owned))


def _expert_buckets(shape: ModelShape, layout: Layout, found: Sequence[Bucket]) -> set[int]:
    """Which of a rank's buckets hold its experts: the last one of each chunk."""
    if layout.expert == 1 or shape.experts is None:
        return set()
    each, tied = layer_counts(shape, layout).experts, shape.layers // (layout.pipeline * layout.virtual)
    count = sum(each) * tied
    return {i for i, b in enumerate(found) if b.parameters == count and b.replicas == layout.expert_replicas}


def fullest(shape: ModelShape, trainer: TrainerConfig, dtype: str) -> StateBytes:
    """State of a rank of the pipeline stage that has the most of it."""
    layout, adam = Layout.of(trainer), trainer.optimizer
    stages = (largest(shape, layout, s).state(dtype, sharded=layout.sharded, adam=adam) for s in range(layout.pipeline))
    return max(stages, key=lambda state: state.total)


def arena_bytes(shape: ModelShape, trainer: TrainerConfig, dtype: str) -> int:
    """What such a rank keeps in host memory for `trainer.offload`; gradients are given up, not copied."""
    held = fullest(shape, trainer, dtype)
    return held.parameters * ("parameters" in trainer.offload) + held.optimizer * ("optimizer" in trainer.offload)


@functools.lru_cache(maxsize=4096)
def largest(shape: ModelShape, layout: Layout, stage: int) -> Held:
    """The most that any rank of a stage holds. An owner's piece counts whole, padding included."""
    found = buckets(shape, layout, stage)
    owned = sum(b.size // b.replicas if layout.sharded else b.parameters for b in found)
    return Held(sum(b.parameters for b in found), sum(b.size for b in found), owned)
