"""What a distributed checkpoint holds of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stare_megatron.convert.mapping import by_key, mcore_objects
from stare_megatron.models.entries import hf_names
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shape import ModelShape
from stare_megatron.models.weights import parameters
from tests.unit.convert import hf_folders

EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def of(folder: Path, **fields: Any) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(hf_folders.CONFIG | fields))
    return read_hf_config(folder)


def test_every_linear_has_its_empty_object_and_the_router_none(tmp_path: Path) -> None:
    shape = of(tmp_path, **EXPERTS)
    assert "decoder.layers.mlp.router.weight" in by_key(shape)
    keys = set(mcore_objects(shape))
    assert not any("router" in key for key in keys)
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "pre_mlp_layernorm")
    assert {f"decoder.layers.{name}._extra_state/shard_1_2" for name in linears} <= keys
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_1.3_2.4" in keys
    assert any("linear_fc1" in key for key in mcore_objects(of(tmp_path)))


def test_tensors_make_up_the_parameters(tmp_path: Path) -> None:
    for fields in ({}, EXPERTS, {"tie_word_embeddings": True}):
        shape = of(tmp_path, **fields)
        assert sum(n * (m[0] if m else 1) for n, *m in hf_names(shape).values()) == parameters(shape)
