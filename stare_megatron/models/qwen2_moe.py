"""Qwen2 mixture of experts (transformers `Qwen2MoeForCausalLM`), Qwen1.5-MoE: beside the experts one that is shared."""

from __future__ import annotations

import dataclasses

from stare_megatron.models.experts import every_layer, expert_number, routed, shared
from stare_megatron.models.shape import Experts, Family, Fields, ModelShape, Tensor, dense_attention, read_dense


def read(f: Fields) -> ModelShape:
    f.only("use_sliding_window", False)
    every_layer(f)
    experts = Experts(
        number=expert_number(f, "num_experts", "num_local_experts", 60),
        top_k=f.size("num_experts_per_tok", 4),
        ffn=f.size("moe_intermediate_size", 1408),
        normalize=f.take("norm_topk_prob", bool, False),
        shared_ffn=f.size("shared_expert_intermediate_size", 5632),
    )
    bias = f.take("qkv_bias", bool, True)
    shape = read_dense(f, "qwen2_moe", qkv_bias=bias, qk_norm=False, kv_groups=16)
    f.no_window(shape.layers)
    return dataclasses.replace(shape, experts=experts)


def layer(shape: ModelShape) -> tuple[Tensor, ...]:
    experts = routed("mlp", "gate_proj", "up_proj", "down_proj")
    return dense_attention(shape) + experts + shared("mlp.shared_expert")


FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", read, layer)
