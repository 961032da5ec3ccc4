"""Seconds of a step by phase, each with what bounds it.

A pass over a micro-batch on a stage costs its matrix products and attention at the rate the GPU reaches, the bytes its
elementwise kernels move, what the host takes to launch them, and the messages between ranks, one after the other:
nothing is taken to overlap. `Constants` says where the rates come from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from stare_megatron.config import Config
from stare_megatron.models.layout import GPU_PUSH_BUCKET, element_bytes, padded_vocab, recompute_modules
from stare_megatron.models.shape import ModelShape
from stare_megatron.models.weights import parameters
from stare_megatron.plan import lengths as lens
from stare_megatron.plan.activations import Layers, Sizes, kept
from stare_megatron.plan.hardware import Constants, Gpu
from stare_megatron.plan.lengths import Lengths
from stare_megatron.plan.parameters import Layout, largest
from stare_megatron.plan.work import work_of

# Seconds of a chunk of whole tensors beside its copies: its handle made, sent and opened, and answers. Fitted to the
# one push measured, of two chunks between two processes (docs/planning.md).
_CHUNK, _CHUNK_BYTES = 2.4e-3, 2**30
_WORD = 0.5e-3  # seconds of a message of a sharded push beside its bytes: launches, and two words over gloo; assumed


@dataclass(frozen=True)
class Machine:
    """A kind of GPU, what of it is reached, and whose layers run on it."""

    gpu: Gpu
    constants: Constants
    layers: Layers

    @property
    def gemm(self) -> float:
        """FLOP/s of matrix products."""
        return self.gpu.flops * self.constants.gemm

    @property
    def memory(self) -> float:
        """Bytes/s of its memory."""
        return self.gpu.bandwidth * self.constants.bandwidth

    @property
    def launch(self) -> float:
        """Seconds of the host, a layer and micro-batch."""
        c = self.constants
        return c.launch_engine if self.layers is Layers.ENGINE else c.launch_local

    def link(self, ranks: int, stride: int = 1) -> float:
        """Bytes/s between the ranks of a group that has every `stride`-th one."""
        inside = ranks * stride <= self.gpu.per_node
        return (self.gpu.nvlink if inside else self.gpu.network) * self.constants.link


@dataclass(frozen=True)
class Parts:
    """Seconds, by what bounds them."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    launches: float = 0.0
    links: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, factor: float) -> Parts:
        return Parts(*(a * factor for a in self.values()))

    def values(self) -> tuple[float, ...]:
        return self.products, self.attention, self.memory, self.launches, self.links

    @property
    def total(self) -> float:
        return sum(self.values())


BOUNDS = {
    "products": "matrix products",
    "attention": "attention",
    "memory": "elementwise kernels (memory)",
    "launches": "the host's launches: raise trainer.micro_batch_tokens",
    "links": "messages between ranks",
    "bubble": "pipeline bubbles",
}


@dataclass(frozen=True)
class PassTime:
    """Of one pass over a step's batch. `parts`: of the busiest stage; `bubble`: seconds it waits for others; `flops`:
    of the model, without what is computed again; `mfu`: those by what all GPUs could do."""

    seconds: float
    parts: Parts
    bubble: float
    micro_batches: int
    flops: float
    mfu: float

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.seconds if self.seconds else 0.0

    @property
    def bound(self) -> str:
        """What takes most of it."""
        seconds = dict(zip(BOUNDS, (*self.parts.values(), self.bubble), strict=True))
        return BOUNDS[max(seconds, key=lambda name: seconds[name])]


@dataclass(frozen=True)
class Ranks:
    """The trainer's ranks of a run, and the batches they see."""

    config: Config
    shape: ModelShape
    machine: Machine
    lengths: Lengths

    @property
    def layout(self) -> Layout:
        return Layout.of(self.config.trainer)

    def batches(self) -> list[list[int]]:
        """Of each optimizer step: tokens of the micro-batches of the data-parallel rank with the most."""
        t = self.config.trainer
        multiple = t.pipeline_parallel if t.virtual_pipeline > 1 else 1
        return _batches(self.lengths, t.data_parallel, t.updates_per_batch, t.micro_batch_tokens, multiple)

    def _layer(self, tokens: float) -> Parts:
        """Forward through one layer of a rank, a micro-batch of `tokens` on each context-parallel rank."""
        m, layout, shape, dtype = self.machine, self.layout, self.shape, self.config.model.dtype
        work, s = work_of(shape), Sizes.of(shape, layout, dtype)
        own = tokens / layout.tensor
        squares = tokens * self.lengths.mean_square * work.attention / layout.tensor
        padding = 1.1 if m.layers is Layers.LOCAL else 1.0
        each = kept(shape, layout, m.layers, dtype)
        return Parts(
            products=work.layer * own / m.gemm,
            attention=squares * padding / (m.gpu.flops * m.constants.attention),
            memory=each.total * tokens * m.constants.traffic / m.memory,
            launches=m.launch,
            links=self._messages(tokens, s),
        )

    def _messages(self, tokens: float, s: Sizes) -> float:
        """Seconds of the messages of a layer, forward."""
        m, layout = self.machine, self.layout
        states = s.byte * s.hidden * tokens
        seconds = 0.0
        if layout.tensor > 1:  # two all-reduces, or as many gathers and scatters of half the bytes each
            seconds += 2 * 2 * (layout.tensor - 1) / layout.tensor * states / m.link(layout.tensor)
        if layout.context > 1:
            keys = 2 * s.byte * s.key * tokens * (layout.context - 1)
            seconds += keys / m.link(layout.context, layout.tensor)
        if layout.expert > 1 and self.shape.experts is not None:
            routed = states * self.shape.experts.top_k / (layout.tensor if layout.sequence_parallel else 1)
            away = (layout.expert - 1) / layout.expert
            seconds += 2 * routed * away / m.link(layout.expert, layout.expert_tensor)
        return seconds

    def _head(self, tokens: float, *, backward: bool) -> Parts:
        """The output layer of the positions with a loss."""
        m, layout, work = self.machine, self.layout, work_of(self.shape)
        rows = tokens * self.lengths.action_share
        byte = element_bytes(self.config.model.dtype)
        columns = padded_vocab(self.shape.vocab, layout.tensor) / layout.tensor
        once = byte * rows * columns / m.memory
        products = work.head * rows / layout.tensor / m.gemm
        chunked = self.config.trainer.logits_chunk_tokens > 0
        if not backward:
            return Parts(products=products, memory=2 * once)
        return Parts(products=(3 if chunked else 2) * products, memory=(5 if chunked else 3) * once)

    def _stage_layers(self) -> float:
        return self.shape.layers / self.layout.pipeline

    def forward(self, tokens: float) -> Parts:
        """A micro-batch on the busiest stage, the last one."""
        local = tokens / self.layout.context
        return self._layer(local) * self._stage_layers() + self._head(local, backward=False)

    def backward(self, tokens: float) -> Parts:
        """As `forward`: twice its products, two and a half times its attention, and what is computed again."""
        m, t, local = self.machine, self.config.trainer, tokens / self.layout.context
        once = self._layer(local)
        back = Parts(2 * once.products, 2.5 * once.attention, 2 * once.memory, once.launches, once.links)
        if t.recompute == "full":
            back = back + once
        elif t.recompute == "selective" and set(recompute_modules(t, self.shape)) & {"mlp", "moe"}:
            back = back + Parts(once.products * self._mlp_share(), 0.0, once.memory / 2, once.launches / 4, 0.0)
        held = largest(self.shape, self.layout, self.layout.pipeline - 1).parameters
        summed = 12.0 * held / m.memory  # a gradient is made, and added to the float32 one
        return back * self._stage_layers() + self._head(local, backward=True) + Parts(memory=summed)

    def _mlp_share(self) -> float:
        return 6.0 * self.shape.hidden * self.shape.active_ffn / work_of(self.shape).layer

    def score(self) -> PassTime:
        """The passes before the update: scoring's and the reference's, where there are."""
        passes = (self.config.trainer.scoring != "rollout") + self.config.algorithm.kl.on
        if not passes:
            return PassTime(0.0, Parts(), 0.0, 0, 0.0, 0.0)
        return self._pass(lambda tokens: self.forward(tokens) * passes, float(passes), Parts())

    def update(self) -> PassTime:
        """Forward, backward and the optimizer's steps."""
        return self._pass(lambda tokens: self.forward(tokens) + self.backward(tokens), 3.0, self.optimizer())

    def optimizer(self) -> Parts:
        """One step: gradients reduced over replicas, Adam, parameters gathered."""
        m, layout = self.machine, self.layout
        mine, settings = largest(self.shape, layout, 0), self.config.trainer.optimizer
        byte = element_bytes(self.config.model.dtype)
        gradient = element_bytes(settings.main_grads_dtype)
        adam = 30.0 * mine.owned / m.memory
        if settings.precision_aware:  # what is kept is read and written, gradients are read
            state = mine.state(self.config.model.dtype, sharded=layout.sharded, adam=settings)
            kept = state.optimizer + 2 * state.copied + byte * mine.owned
            adam = (2.0 * kept + gradient * mine.owned) / m.memory
        links = 0.0
        if layout.replicas > 1:
            sent = (gradient + byte) * mine.buffer * (layout.replicas - 1) / layout.replicas
            # A ring over nodes goes out of each by all of its GPUs' links.
            links = sent / m.link(layout.replicas, layout.tensor)
        return Parts(memory=adam, links=links)

    def _pass(self, cost: Callable[[float], Parts], factor: float, after: Parts) -> PassTime:
        """`cost`: of a micro-batch by its tokens, a straight line."""
        layout, m, batches = self.layout, self.machine, self.batches()
        each = cost(0.0)
        token = cost(1.0) + each * -1.0
        parts, bubble = Parts(), 0.0
        weight = self.lengths.weight
        for batch in batches:
            parts = parts + (each * len(batch) + token * sum(batch)) * weight + after
            longest = (each + token * max(batch)).total
            bubble += (layout.pipeline - 1) / layout.virtual * longest
        work = work_of(self.shape)
        flops = factor * weight * work.forward(self.lengths.sequences, self.lengths.action_share)
        seconds = parts.total + bubble
        able = seconds * layout.world * m.gpu.flops
        count = round(weight * max(map(len, batches)))
        return PassTime(seconds, parts, bubble, count, flops, flops / able if able else 0.0)


@functools.lru_cache(maxsize=256)
def _batches(lengths: Lengths, ranks: int, updates: int, budget: int, multiple: int) -> list[list[int]]:
    found = []
    for update in range(updates):
        packed = lens.micro_batches(lens.deal(lengths.sequences[update::updates], ranks), budget)
        found.append(packed + [0] * (-len(packed) % multiple))
    return found


@dataclass(frozen=True)
class PushTime:
    """`bytes`: of the model in its dtype, which every engine is sent; seconds."""

    seconds: float
    bytes: float


def push_time(config: Config, shape: ModelShape, machine: Machine) -> PushTime:
    """Whole tensors are gathered over the ranks that split them, then handed on: within a GPU, or broadcast. In shards
    each engine worker gets its part from those who have it, and is packed for and loads at the memory's rate."""
    t, i = config.trainer, config.inference
    size = parameters(shape) * float(element_bytes(config.model.dtype))
    if config.sync.method == "sharded":
        return PushTime(_sharded_push(config, size, machine), size)
    split = t.tensor_parallel * t.pipeline_parallel * t.expert_parallel
    gather = size / machine.link(split) if split > 1 else 0.0
    # Gathered by whole tensors, which are written once more; what comes is put into the engine's layers.
    copies = (1 + 2) * size / machine.memory + handed_on(size, machine)
    sent = 0.0
    if i.placement == "separate":
        sent = size / machine.link(t.world_size + i.engines * i.tensor_parallel)
    return PushTime(gather + copies + sent, size)


def handed_on(size: float, machine: Machine) -> float:
    """Seconds in which whole tensors of `size` bytes are packed into chunks and taken out of them on one GPU."""
    return 4 * size / machine.memory + _CHUNK * math.ceil(size / _CHUNK_BYTES)


def _sharded_push(config: Config, size: float, machine: Machine) -> float:
    """Seconds in which a worker gets its part, or a rank has sent what is asked of it, whichever takes longer."""
    t, i = config.trainer, config.inference
    part, workers = size / i.tensor_parallel, i.engines * i.tensor_parallel
    away, link = 1.0, machine.link(t.world_size + workers)
    if i.placement == "colocated":  # of what it needs the rank on its GPU has some, and a copy of the model around it
        copy = t.tensor_parallel * t.pipeline_parallel * t.expert_parallel
        away, link = 1 - 1 / copy, machine.link(copy)
    sent = part * workers / t.world_size
    copies = 2 * (part + sent) / machine.memory  # packed and loaded, each read and written
    words = _WORD * max(part, sent) / GPU_PUSH_BUCKET
    return copies + max(part, sent) * away / link + words


@dataclass(frozen=True)
class SaveTime:
    """A checkpoint: `bytes` over all ranks; `seconds` while the loop waits: the copy to the host's memory; `written`:
    until it is on disk, while training goes on."""

    seconds: float
    written: float
    bytes: float


def save_time(config: Config, shape: ModelShape, machine: Machine) -> SaveTime:
    """Weights, master weights and moments, each once."""
    byte = element_bytes(config.model.dtype)
    size = parameters(shape) * (byte + (8.0 if byte == 4 else 12.0))
    each = size / config.trainer.world_size
    host = machine.gpu.host * machine.constants.host
    return SaveTime(each / host, each / machine.constants.disk, size)
