"""The smallest configuration that can be read, for tests that are about one table of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from stare_megatron.config import Config, parse
from stare_megatron.models.entries import hf_names
from stare_megatron.models.families import read_hf_config

MINIMAL: dict[str, dict[str, Any]] = {
    "run": {"name": "unit", "steps": 5},
    "model": {"path": "m"},
    "data": {"train": ["d.jsonl"]},
    "reward": {"name": "math"},
}


def tables(**changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`MINIMAL` with the keys of some tables changed or added."""
    return MINIMAL | {name: MINIMAL.get(name, {}) | dict(keys) for name, keys in changes.items()}


def configuration(**changes: Mapping[str, Any]) -> Config:
    """`tables`, read."""
    return parse(tables(**changes), "test")


FLOAT8: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bfloat16"},
    "algorithm": {"method": "grpo", "correction": {"mode": "truncate"}},
    "sync": {"probe_threshold": 0.2},
}
"""What engines or ranks in float8 need."""


def changed(tables: Mapping[str, dict[str, Any]], changes: Mapping[str, dict[str, Any]]) -> Config:
    """Both read as one configuration; a key of `changes` wins."""
    return configuration(**{name: tables.get(name, {}) | changes.get(name, {}) for name in {**tables, **changes}})


def small_model(folder: Path, experts: int = 0, *, weights: bool = True, **fields: Any) -> Path:
    """A checkpoint folder of four layers that preflight takes; every weight is 0. Without `weights` it has none."""
    folder.mkdir()
    shape: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 112,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    if experts:
        shape |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 32, "num_experts": experts,
            "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape | fields))
    (folder / "tokenizer.json").write_text("{}")
    if not weights:
        return folder
    names = hf_names(read_hf_config(folder))
    save_file({name: np.zeros(want, np.float16) for name, want in names.items()}, folder / "model.safetensors")
    return folder
