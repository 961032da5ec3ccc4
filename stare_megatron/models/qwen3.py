"""Qwen3 dense (transformers `Qwen3ForCausalLM`): norms on queries and keys, no bias."""

from __future__ import annotations

from stare_megatron.models.shape import Family, Fields, ModelShape, dense_layer, read_dense


def read(f: Fields) -> ModelShape:
    f.only("attention_bias", False)
    shape = read_dense(f, "qwen3", qkv_bias=False, qk_norm=True, kv_groups=32, head_dim=128)
    f.no_window(shape.layers)
    return shape


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read, dense_layer)
