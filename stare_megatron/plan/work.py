"""Floating-point operations of a model: what a token costs forward. No torch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from stare_megatron.models.entries import full_shapes
from stare_megatron.models.families import FAMILIES
from stare_megatron.models.shape import ModelShape, Split


@dataclass(frozen=True)
class Work:
    """Of the whole model, forward. `layer`: a token's products with one layer's weights, FLOP; of a mixture of experts
    with those of its chosen experts. `attention`: a layer's attention in a sequence, FLOP by its length's square.
    `head`: of a position that meets the output layer, FLOP."""

    layers: int
    layer: float
    attention: float
    head: float

    def forward(self, sequences: list[int], head_share: float) -> float:
        """FLOP of a pass over sequences of these lengths. `head_share`: of positions, those that meet the head."""
        tokens, squares = sum(sequences), sum(n * n for n in sequences)
        return self.layers * (self.layer * tokens + self.attention * squares) + self.head * tokens * head_share


@functools.lru_cache(maxsize=64)
def work_of(shape: ModelShape) -> Work:
    """Products are 2 FLOP a weight; causal attention is 2 x 2 x (n^2 / 2) x heads x head size."""
    weights = 0.0
    for tensor in FAMILIES[shape.family].layer(shape):
        each = sum(math.prod(want) for want in full_shapes(tensor.layout, shape, tensor.local) if len(want) == 2)
        chosen = tensor.layout in (Split.EXPERT_GATED, Split.EXPERT_ROW)
        weights += each * (shape.experts.top_k if chosen and shape.experts else 1)
    return Work(
        layers=shape.layers,
        layer=2.0 * weights,
        attention=2.0 * shape.heads * shape.head_dim,
        head=2.0 * shape.vocab * shape.hidden,
    )
