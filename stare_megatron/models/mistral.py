"""Mistral (transformers `MistralForCausalLM`), 7B to Small: Llama's layers, with a window on attention in some.

Within a window attention is whole, so a model that has one is served up to its length, exactly, and not beyond it.
"""

from __future__ import annotations

import dataclasses

from stare_megatron.models.shape import Family, Fields, ModelShape, dense_layer, read_dense


def within(shape: ModelShape, window: int | None) -> ModelShape:
    """The model as far as a window on attention hides nothing; None, or 0: there is none."""
    longest = min(shape.max_positions, window or shape.max_positions)
    return dataclasses.replace(shape, max_positions=longest)


def read(f: Fields) -> ModelShape:
    window = f.optional("sliding_window", int, 4096)
    return within(read_dense(f, "mistral", qkv_bias=False, qk_norm=False, kv_groups=8), window)


FAMILY = Family("mistral", "MistralForCausalLM", read, dense_layer)
