"""Every parameter of a whole model, and the rows that Hugging Face's and Megatron-Core's tensors share. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stare_megatron.models.families import FAMILIES
from stare_megatron.models.shape import ModelShape, Split, Tensor

_EMBEDDING = Tensor(Split.VOCAB, ("model.embed_tokens.weight",), "embedding.word_embeddings.weight")
_FINAL_NORM = Tensor(Split.REPLICATED, ("model.norm.weight",), "decoder.final_layernorm.weight")
_HEAD = Tensor(Split.VOCAB, ("lm_head.weight",), "output_layer.weight")
# The last pipeline stage's copy of tied embeddings.
_TIED_HEAD = Tensor(Split.VOCAB, _EMBEDDING.names, _HEAD.local)


@dataclass(frozen=True)
class ParameterEntry:
    """One parameter of the whole model: `layer` (from 0) or None outside of the layers."""

    layer: int | None
    tensor: Tensor

    def names(self, expert: int = 0) -> list[str]:
        """Its Hugging Face tensors."""
        prefix = "" if self.layer is None else f"model.layers.{self.layer}."
        return [prefix + name.format(e=expert) for name in self.tensor.names]

    @property
    def of_experts(self) -> bool:
        return self.tensor.layout in (Split.EXPERT_GATED, Split.EXPERT_ROW)

    @property
    def saved(self) -> str:
        """Key in a distributed checkpoint, where all layers are one tensor with a leading axis of layers."""
        return self.tensor.saved_name if self.layer is None else f"decoder.layers.{self.tensor.saved_name}"

    def experts(self, shape: ModelShape) -> int:
        """Number of experts; 1 for what is not of experts."""
        return shape.experts.number if self.of_experts and shape.experts else 1

    def wants(self, shape: ModelShape) -> list[tuple[int, ...]]:
        """Full shapes of its Hugging Face tensors (of one expert)."""
        return full_shapes(self.tensor, shape)


def entries(shape: ModelShape) -> list[ParameterEntry]:
    """Every parameter in the order of export: embedding, layers, final norm, head."""
    layer = FAMILIES[shape.family].layer(shape)
    inner = [ParameterEntry(i, tensor) for i in range(shape.layers) for tensor in layer]
    outer = [ParameterEntry(None, tensor) for tensor in (_EMBEDDING, _FINAL_NORM, _HEAD)]
    return [outer[0], *inner, *(outer[1:2] if shape.tied else outer[1:])]


def local_entries(shape: ModelShape) -> list[ParameterEntry]:
    """Every parameter a rank may hold: with the last stage's copy of tied embeddings."""
    return entries(shape) + [ParameterEntry(None, _TIED_HEAD)] * shape.tied


def hf_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and full shape of every Hugging Face tensor of the model, in the order of export."""
    for entry in entries(shape):
        wants = entry.wants(shape)
        for expert in range(entry.experts(shape)):
            yield from zip(entry.names(expert), wants, strict=True)


def hf_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """All of `hf_tensors`."""
    return dict(hf_tensors(shape))


@dataclass(frozen=True)
class Part:
    """What a parameter is stacked of: `rows` rows of its Hugging Face tensor number `tensor`, from row `first` on."""

    tensor: int
    first: int
    rows: int


def parts(tensor: Tensor, shape: ModelShape) -> list[Part]:
    """In Megatron-Core's order; one for each Hugging Face tensor, where Hugging Face does not stack them, too."""
    rows = [want[0] for want in _part_shapes(tensor, shape)]
    if len(tensor.names) == len(rows):
        return [Part(i, 0, n) for i, n in enumerate(rows)]
    return [Part(0, sum(rows[:i]), n) for i, n in enumerate(rows)]


def full_shapes(tensor: Tensor, shape: ModelShape) -> list[tuple[int, ...]]:
    """Full shapes of the Hugging Face tensors of one parameter (of one expert)."""
    each = _part_shapes(tensor, shape)
    return each if len(tensor.names) == len(each) else [(sum(want[0] for want in each), *each[0][1:])]


def _part_shapes(tensor: Tensor, shape: ModelShape) -> list[tuple[int, ...]]:
    layout, last = tensor.layout, tensor.local
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
    if layout is Split.VOCAB:
        return [(shape.vocab, hidden)]
    if layout is Split.QKV:
        return [(n, hidden) if last.endswith("weight") else (n,) for n in (q, kv, kv)]
    if layout in (Split.GATED, Split.ROW):
        ffn = shape.experts.shared_ffn if shape.experts and "shared_experts" in last else shape.ffn
        return [(ffn, hidden)] * 2 if layout is Split.GATED else [(hidden, q if "linear_proj" in last else ffn)]
    if layout in (Split.EXPERT_GATED, Split.EXPERT_ROW):
        assert shape.experts is not None
        ffn = shape.experts.ffn
        return [(ffn, hidden)] * 2 if layout is Split.EXPERT_GATED else [(hidden, ffn)]
    if "router" in last:
        assert shape.experts is not None
        return [(shape.experts.number, hidden)]
    if "gate_weight" in last:
        return [(1, hidden)]
    return [(shape.head_dim,) if "q_layernorm" in last or "k_layernorm" in last else (hidden,)]


@dataclass(frozen=True)
class Segment:
    """`count` rows that are row `hf` of the parameter's Hugging Face tensor number `part` and row `mcore` of its
    Megatron-Core tensor."""

    part: int
    hf: int
    mcore: int
    count: int

    def shared(self, first: int, last: int, *, of_mcore: bool) -> tuple[int, int] | None:
        """Offsets into this segment of those of its rows that lie in [first, last) of the one tensor or the other."""
        start = self.mcore if of_mcore else self.hf
        low, high = max(first - start, 0), min(last - start, self.count)
        return (low, high) if low < high else None


def segments(entry: ParameterEntry, shape: ModelShape) -> Iterator[Segment]:
    """How the rows of the whole (unsplit, unpadded) tensors correspond, in the order of Megatron-Core's."""
    stacked = parts(entry.tensor, shape)
    if entry.tensor.layout is Split.QKV:
        size, queries = shape.head_dim, shape.heads // shape.kv_groups * shape.head_dim
        for group in range(shape.kv_groups):
            start = group * (queries + 2 * size)
            for part, rows in zip(stacked, (queries, size, size), strict=True):
                yield Segment(part.tensor, part.first + group * rows, start, rows)
                start += rows
        return
    start = 0
    for part in stacked:
        yield Segment(part.tensor, part.first, start, part.rows)
        start += part.rows
