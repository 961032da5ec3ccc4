"""Qwen3 mixture of experts (transformers `Qwen3MoeForCausalLM`): experts in every layer, no shared expert."""

from __future__ import annotations

import dataclasses

from stare_megatron.errors import UserError
from stare_megatron.models.shape import Experts, Family, Fields, ModelShape, Split, Tensor, dense_attention, read_dense

MOST_EXPERTS = 10_000


def read(f: Fields) -> ModelShape:
    f.only("attention_bias", False)
    f.only("decoder_sparse_step", 1)
    f.only("mlp_only_layers", [])
    # transformers 5 writes the second name for the first.
    number = f.agreeing(f.take("num_experts", int, None), f.take("num_local_experts", int, None), "num_experts")
    if not 1 <= (number or 0) <= MOST_EXPERTS:
        raise UserError(f"{f.path}: num_experts = {number!r:.20} should be from 1 to {MOST_EXPERTS:,}")
    experts = Experts(
        number=number,
        top_k=f.size("num_experts_per_tok"),
        ffn=f.size("moe_intermediate_size"),
        normalize=f.take("norm_topk_prob", bool, False),
    )
    shape = read_dense(f, "qwen3_moe", qkv_bias=False, qk_norm=True, kv_groups=4)
    f.no_window(shape.layers)
    return dataclasses.replace(shape, experts=experts)


def layer(shape: ModelShape) -> tuple[Tensor, ...]:
    return (
        *dense_attention(shape),
        Tensor(Split.REPLICATED, ("post_attention_layernorm.weight",), "pre_mlp_layernorm.weight"),
        Tensor(Split.REPLICATED, ("mlp.gate.weight",), "mlp.router.weight"),
        Tensor(
            Split.EXPERT_GATED,
            ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
            "mlp.experts.local_experts.{e}.linear_fc1.weight",
            "mlp.experts.linear_fc1.weight{e}",
            "mlp.experts.experts.linear_fc1.weight",
        ),
        Tensor(
            Split.EXPERT_ROW,
            ("mlp.experts.{e}.down_proj.weight",),
            "mlp.experts.local_experts.{e}.linear_fc2.weight",
            "mlp.experts.linear_fc2.weight{e}",
            "mlp.experts.experts.linear_fc2.weight",
        ),
    )


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, layer)
