"""Qwen2 and Qwen2.5 (transformers `Qwen2ForCausalLM`), DeepSeek-R1-Distill-Qwen: bias on queries, keys and values."""

from __future__ import annotations

from stare_megatron.models.shape import Family, Fields, ModelShape, dense_layer, read_dense


def read(f: Fields) -> ModelShape:
    f.only("use_mrope", False)
    shape = read_dense(f, "qwen2", qkv_bias=True, qk_norm=False, kv_groups=32)
    f.no_window(shape.layers)
    return shape


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read, dense_layer)
