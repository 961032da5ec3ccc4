"""Qwen3 mixture of experts (transformers `Qwen3MoeForCausalLM`): experts in every layer, no shared expert."""

from __future__ import annotations

import dataclasses

from stare_megatron.models.experts import every_layer, expert_number, routed
from stare_megatron.models.shape import Experts, Family, Fields, ModelShape, Tensor, dense_attention, read_dense


def read(f: Fields) -> ModelShape:
    f.only("attention_bias", False)
    every_layer(f)
    experts = Experts(
        number=expert_number(f, "num_experts", "num_local_experts"),
        top_k=f.size("num_experts_per_tok"),
        ffn=f.size("moe_intermediate_size"),
        normalize=f.take("norm_topk_prob", bool, False),
    )
    shape = read_dense(f, "qwen3_moe", qkv_bias=False, qk_norm=True, kv_groups=4)
    f.no_window(shape.layers)
    return dataclasses.replace(shape, experts=experts)


def layer(shape: ModelShape) -> tuple[Tensor, ...]:
    return dense_attention(shape) + routed("mlp", "gate_proj", "up_proj", "down_proj")


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, layer)
