"""What is read from published configurations of the families beside Llama's and Qwen's, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.errors import UserError
from stare_megatron.models.shape import Experts
from tests.unit.models import test_bridge as bridge
from tests.unit.models.test_bridge import LLAMA, read

MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32768}
MIXTRAL = MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
PHI3 = bridge.PHI3 | {"max_position_embeddings": 32768}
QWEN2_MOE = MISTRAL | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 192,
}
LONGROPE = {"type": "longrope", "long_factor": [1.0] * 16, "short_factor": [1.0] * 16}
# config.json of published checkpoints, with the fields that are peculiar to them, and what is read of it.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Mistral-7B-v0.1": (MISTRAL | {"sliding_window": 4096, "rope_theta": 10000.0}, {"max_positions": 4096}),
    "Mistral-7B-Instruct-v0.3": (
        MISTRAL | {"sliding_window": None, "rope_theta": 1000000.0, "attention_dropout": 0.0},
        {"max_positions": 32768, "rope_theta": 1e6, "qkv_bias": False},
    ),
    "a window left out is transformers' own": (MISTRAL, {"max_positions": 4096}),
    "Mixtral-8x7B-Instruct-v0.1": (
        MIXTRAL | {"sliding_window": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02},
        {"max_positions": 32768, "experts": Experts(number=8, top_k=2, ffn=96, normalize=True)},
    ),
    "phi-4": (
        PHI3
        | {"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rope_theta": 250000, "rope_scaling": None}
        | {"original_max_position_embeddings": 16384, "sliding_window": None, "auto_map": {}},
        {"max_positions": 32768, "rope_theta": 250000.0, "norm_eps": 1e-5},
    ),
    "Phi-3-mini-4k-instruct": (PHI3 | {"sliding_window": 2047}, {"max_positions": 2047}),
    "Qwen1.5-MoE-A2.7B": (
        QWEN2_MOE
        | {"decoder_sparse_step": 1, "max_window_layers": 21, "norm_topk_prob": False, "sliding_window": 32768}
        | {"use_sliding_window": False, "router_aux_loss_coef": 0.001, "output_router_logits": False},
        {"qkv_bias": True, "experts": Experts(number=60, top_k=4, ffn=48, normalize=False, shared_ffn=192)},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(tmp_path: Path, name: str) -> None:
    fields, expected = PUBLISHED[name]
    shape = read(tmp_path, fields)
    assert {key: getattr(shape, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (MISTRAL | {"attention_bias": True}, "attention_bias = True"),
        (MISTRAL | {"architectures": ["Mistral3ForConditionalGeneration"]}, "Mistral3ForConditionalGeneration"),
        (MISTRAL | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        (PHI3 | {"rope_scaling": LONGROPE}, "rope_type = 'longrope'"),
        (PHI3 | {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75"),
        (QWEN2_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (QWEN2_MOE | {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
        (QWEN2_MOE | {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size = 0 should be from 1"),
        (QWEN2_MOE | {"use_sliding_window": True}, "use_sliding_window = True"),
        (MIXTRAL | {"num_local_experts": 0}, "num_local_experts = 0 should be from 1"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as e:
        read(tmp_path, fields)
    assert says in str(e.value)


def test_a_shared_expert_that_does_not_divide(tmp_path: Path) -> None:
    ones = {"tensor_parallel": 1, "pipeline_parallel": 1, "virtual_pipeline": 1, "expert_parallel": 1}
    shape = read(tmp_path, QWEN2_MOE | {"shared_expert_intermediate_size": 51, "num_experts_per_tok": 2})
    shape.check_layout(**ones)
    with pytest.raises(UserError, match=r"does not divide the model's 51 \(shared expert\)"):
        shape.check_layout(**(ones | {"tensor_parallel": 2}))


def test_what_a_token_meets_of_experts(tmp_path: Path) -> None:
    """Beside the chosen ones the one that is shared, and its gate, of one number a row."""
    with_shared, without = (
        read(tmp_path, QWEN2_MOE),
        dataclasses.replace(read(tmp_path, QWEN2_MOE), experts=Experts(60, 4, 48, normalize=False)),
    )
    more = with_shared.layers * with_shared.hidden * (3 * 192 + 1)
    assert with_shared.sequence_cost.linear - without.sequence_cost.linear == 2 * more
    assert with_shared.active_ffn == 4 * 48 + 192
