"""Floating-point operations of a model: what a token costs forward. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from stare_megatron.models.shape import ModelShape


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


def work_of(shape: ModelShape) -> Work:
    """`ModelShape.sequence_cost` by its parts."""
    cost, head = shape.sequence_cost, 2.0 * shape.vocab * shape.hidden
    return Work(shape.layers, (cost.linear - head) / shape.layers, cost.quadratic / shape.layers, head)
