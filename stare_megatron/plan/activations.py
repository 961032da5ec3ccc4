"""What a layer keeps for its backward pass, counted tensor by tensor from the code. No torch.

The local layers are held to the tensors that autograd really saves (tests/invariance/test_plan_activations.py) and, as
a whole, to the peaks measured on an H100 (docs/planning.md). Transformer Engine's are read from its source: no GPU has
run them here.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

from stare_megatron.config import TrainerConfig
from stare_megatron.models.layout import element_bytes, padded_vocab, recompute_modules
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan.parameters import Layout

# Sequences of similar length are attended as one batch, right-padded to its longest: at most a quarter more.
_ATTENTION_PADDING = 1.1
_INDEX = 8  # bytes of an index


class Layers(enum.Enum):
    """Whose layers: Megatron-Core's own on a GPU, Transformer Engine's, or Megatron-Core's own on a CPU, whose norms
    keep float32 copies."""

    LOCAL = "local"
    ENGINE = "transformer_engine"
    CPU = "cpu"


@dataclass(frozen=True)
class Kept:
    """Bytes a token of a micro-batch keeps in one layer of a rank, by part. `entry`: the layer's input, which is all
    that full recomputation keeps; `inputs`: what the norms hand to the linears; `shared`: of `mlp`, what an expert that
    is shared keeps."""

    entry: float
    inputs: float
    attention: float
    core: float
    mlp: float
    shared: float = 0.0

    @property
    def total(self) -> float:
        return self.entry + self.inputs + self.attention + self.core + self.mlp


@dataclass(frozen=True)
class Sizes:
    """Widths on one rank. `stream`: of the residual stream, for each token of the micro-batch; `byte`: of the dtype."""

    stream: float
    hidden: int
    query: float
    key: float
    heads: float
    ffn: float
    byte: int

    @classmethod
    def of(cls, shape: ModelShape, layout: Layout, dtype: str) -> Sizes:
        t = layout.tensor
        return cls(
            stream=shape.hidden / (t if layout.sequence_parallel else 1),
            hidden=shape.hidden,
            query=shape.heads * shape.head_dim / t,
            key=shape.kv_groups * shape.head_dim / t,
            heads=(shape.heads + (shape.kv_groups if shape.qk_norm else 0)) / t,
            ffn=shape.ffn / t,
            byte=element_bytes(dtype),
        )


@functools.lru_cache(maxsize=4096)
def kept(shape: ModelShape, layout: Layout, layers: Layers, dtype: str, *, mixed: bool = True) -> Kept:
    """Of one layer without recomputation. `mixed`: the sequences of a pack differ in length, so that attention on the
    local layers takes them in batches of its own."""
    s = Sizes.of(shape, layout, dtype)
    b = s.byte
    fused = layers is not Layers.CPU
    # A fused norm keeps its input and a number a row; torch's on a CPU its input and output in float32.
    norm = 4.0 if fused else 8 * s.stream + 4
    qkv = b * (s.query + 2 * s.key)
    parts = b * 4 * shape.head_dim  # cosines and sines of queries and keys
    if shape.qk_norm:
        parts += (qkv if fused else 8 * (s.query + s.key)) + 4 * s.heads
    lse = 4 * shape.heads / layout.tensor
    if layers is Layers.ENGINE or not mixed:
        values = 0 if shape.qk_norm and fused else qkv  # values are a view of what the linear made
        core = b * (s.query + s.key) + values + lse
        if layers is not Layers.ENGINE:
            core += b * s.query  # the batches' outputs, before they are put together
    else:
        padding = _ATTENTION_PADDING if fused else 1.0
        core = padding * (b * (2 * s.query + 2 * s.key) + lse + _INDEX) + _INDEX
    if layers is not Layers.ENGINE and layout.context > 1:  # keys and values of the whole sequences
        core += b * 2 * s.key * layout.context
    return Kept(
        entry=b * s.stream if fused else 0.0,
        inputs=2 * b * s.stream + 2 * norm + (b * s.stream if fused else 0.0),
        attention=parts + b * s.query,  # with the input of the projection
        core=core,
        mlp=_mlp(shape, layout, s, layers),
        shared=_shared(shape, layout, s, layers),
    )


def float8_copies(shape: ModelShape, layout: Layout) -> float:
    """Bytes of a rank's weights in float8, as they are and transposed, beside those in 16 bits."""
    s = Sizes.of(shape, layout, "bfloat16")
    return 2.0 * (shape.layers // layout.pipeline) * s.hidden * (2 * s.query + 2 * s.key + 3 * s.ffn)


def _mlp(shape: ModelShape, layout: Layout, s: Sizes, layers: Layers) -> float:
    # gate and up, then their product; the local layers also keep the activation, a copy of up and the gate's.
    widths = 3 if layers is Layers.ENGINE else 5
    if shape.experts is None:
        return s.byte * widths * s.ffn
    e = shape.experts
    if layers is not Layers.ENGINE:
        widths = 6  # and their product by the router's weight
    split = layout.tensor if layout.sequence_parallel else 1
    routed = e.top_k / split * layout.expert_tensor  # rows of this rank's experts for each token
    rows = s.byte * (shape.hidden + widths * e.ffn / layout.expert_tensor) + 4
    router = (5 * e.number + 20 * e.top_k) / split
    return routed * rows + router + _shared(shape, layout, s, layers)


def _shared(shape: ModelShape, layout: Layout, s: Sizes, layers: Layers) -> float:
    """As a dense MLP; and its output, which its gate's value, a number a token, multiplies."""
    if shape.experts is None or not shape.experts.shared_ffn:
        return 0.0
    ffn = shape.experts.shared_ffn / layout.tensor
    return s.byte * ((3 if layers is Layers.ENGINE else 5) * ffn + s.stream + 2)


@dataclass(frozen=True)
class Peak:
    """Bytes of a rank of one stage at the worst moment of a pass, beside what it holds for good. `kept`: for the
    backward pass; `working`: of the layer in hand; `logits`: of the output layer, with its gradients."""

    kept: float
    working: float
    logits: float

    @property
    def total(self) -> float:
        """A layer's working set and the output layer's are never there together."""
        return self.kept + max(self.working, self.logits)


@dataclass(frozen=True)
class Pack:
    """A micro-batch at its largest: `tokens` on a context-parallel rank, `rows` of them with a loss; `copies`: of the
    logits in the backward pass."""

    tokens: float
    rows: float
    copies: int = 1


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage keeps at once, in units of all its layers (1F1B, interleaved 1F1B)."""
    p, v = layout.pipeline, layout.virtual
    if p == 1:
        return 1.0
    if v == 1:
        return float(min(p - stage, micro_batches))
    return min((p - stage - 1) * 2 + (v - 1) * p + 1, micro_batches * v) / v


def update_peak(
    shape: ModelShape, layout: Layout, trainer: TrainerConfig, layers: Layers, dtype: str, stage: int, pack: Pack,
    micro_batches: int,
) -> Peak:  # fmt: skip
    """Of the update pass."""
    each = kept(shape, layout, layers, dtype)
    count = shape.layers // layout.pipeline
    per_token = _kept_per_token(shape, trainer, each, count)
    s = Sizes.of(shape, layout, dtype)
    first, last = stage == 0, stage == layout.pipeline - 1
    outer = _INDEX * first + (2 * s.byte * s.stream + 4) * last
    held = pack.tokens * (per_token + outer) * in_flight(layout, stage, micro_batches)
    # Recomputed, one layer (or what is recomputed of it) exists whole; its gradients are about as large as the MLP.
    again = {"none": 0.0, "selective": each.mlp, "full": _recomputed_layers(trainer) * each.total}[trainer.recompute]
    gradients = each.mlp * 0.8 + 3 * s.byte * s.hidden
    weight = s.byte * s.hidden * max(2 * s.ffn, 1.0) if shape.experts is None else 0.0
    working = pack.tokens * (again + gradients) + weight
    logits = head_bytes(shape, layout, trainer, dtype, pack) if last else 0.0
    return Peak(held, working, logits)


def score_peak(
    shape: ModelShape, layout: Layout, trainer: TrainerConfig, layers: Layers, dtype: str, stage: int, pack: Pack
) -> Peak:
    """Of the scoring pass, which keeps nothing."""
    each = kept(shape, layout, layers, dtype)
    s = Sizes.of(shape, layout, dtype)
    rows = pack.rows if not trainer.logits_chunk_tokens else min(pack.rows, trainer.logits_chunk_tokens)
    columns = padded_vocab(shape.vocab, layout.tensor) / layout.tensor
    logits = s.byte * rows * columns * (stage == layout.pipeline - 1)
    return Peak(2 * s.byte * s.stream * pack.tokens, pack.tokens * each.total * 0.8, logits)


def head_bytes(shape: ModelShape, layout: Layout, trainer: TrainerConfig, dtype: str, pack: Pack) -> float:
    """Of the output layer in the backward pass: logits, which their gradient overwrites, the weight's gradient, and
    the rows' hidden states with theirs."""
    s = Sizes.of(shape, layout, dtype)
    columns = padded_vocab(shape.vocab, layout.tensor) / layout.tensor
    rows, chunk = pack.rows, trainer.logits_chunk_tokens
    hidden = 2 * s.byte * shape.hidden * rows
    if chunk:
        # In chunks the weight's gradient is summed in float32, and rounded at the end.
        return hidden + s.byte * columns * min(rows, chunk) + (4 + s.byte) * columns * shape.hidden
    return hidden + s.byte * columns * rows * pack.copies + s.byte * columns * shape.hidden


def _recomputed_layers(trainer: TrainerConfig) -> int:
    uniform = trainer.megatron.get("recompute_method", "uniform") == "uniform"
    return int(trainer.megatron.get("recompute_num_layers", 1)) if uniform else 1


def _kept_per_token(shape: ModelShape, trainer: TrainerConfig, each: Kept, layers: int) -> float:
    """Bytes a token keeps in all layers of a stage."""
    if trainer.recompute == "none":
        return each.total * layers
    if trainer.recompute == "full":
        number = int(trainer.megatron.get("recompute_num_layers", 1))
        if trainer.megatron.get("recompute_method", "uniform") == "block":
            again = min(number, layers)
            return each.entry * again + each.total * (layers - again)
        return each.entry * -(-layers // number)
    modules = set(recompute_modules(trainer, shape))
    dropped = 0.0
    if modules & {"mlp", "moe"}:
        dropped += each.mlp
    else:
        dropped += (each.mlp - each.shared) / 4 * ("moe_act" in modules) + each.shared * ("shared_experts" in modules)
    if "layernorm" in modules:
        dropped += each.inputs / 2
    if "core_attn" in modules:
        dropped += each.core / 3
    return (each.total - dropped) * layers
