"""Mixtral (transformers `MixtralForCausalLM`): Mistral's attention, experts in every layer that are the whole MLP."""

from __future__ import annotations

import dataclasses

from stare_megatron.models.experts import expert_number, routed
from stare_megatron.models.mistral import within
from stare_megatron.models.shape import Experts, Family, Fields, ModelShape, Tensor, dense_attention, read_dense


def read(f: Fields) -> ModelShape:
    f.only("router_jitter_noise", 0.0)
    number, top_k = expert_number(f, "num_local_experts", "num_experts", 8), f.size("num_experts_per_tok", 2)
    window = f.take("sliding_window", int, None)
    shape = read_dense(f, "mixtral", qkv_bias=False, qk_norm=False, kv_groups=8, norm_eps=1e-5, rope_theta=1e6)
    experts = Experts(number, top_k, shape.ffn, normalize=True)
    return dataclasses.replace(within(shape, window), experts=experts)


def layer(shape: ModelShape) -> tuple[Tensor, ...]:
    return dense_attention(shape) + routed("block_sparse_moe", "w1", "w3", "w2")


FAMILY = Family("mixtral", "MixtralForCausalLM", read, layer)
