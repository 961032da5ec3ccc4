"""Qwen3 dense (transformers `Qwen3ForCausalLM`): norms on queries and keys, no bias."""

from __future__ import annotations

from stare_megatron.trainer.bridge.shape import Family, Fields, ModelShape, dense_layer, read_dense


def read(f: Fields) -> ModelShape:
    f.only("attention_bias", False)
    return read_dense(f, "qwen3", qkv_bias=False, qk_norm=True, tied=False)


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read, dense_layer)
