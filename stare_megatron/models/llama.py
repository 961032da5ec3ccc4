"""Llama 2 and 3 (transformers `LlamaForCausalLM`), DeepSeek-R1-Distill-Llama: no bias, Llama 3's rotary scaling."""

from __future__ import annotations

from stare_megatron.models.shape import Family, Fields, ModelShape, dense_layer, read_dense


def read(f: Fields) -> ModelShape:
    f.only("attention_bias", False)
    return read_dense(f, "llama", qkv_bias=False, qk_norm=False)


FAMILY = Family("llama", "LlamaForCausalLM", read, dense_layer)
