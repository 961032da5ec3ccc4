"""Runs of known models for the planner's tests; their config.json are in tests/data/models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stare_megatron.config import Config
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.estimate import Given, Plan, make
from stare_megatron.plan.hardware import CONSTANTS, GPUS
from stare_megatron.plan.lengths import Lengths, assumed
from stare_megatron.plan.timing import Machine
from tests.configs import configuration

MODELS = Path(__file__).parents[2] / "data" / "models"
ROLLOUT = {"prompts_per_step": 64, "group_size": 8, "max_response_tokens": 8192}
TRAINER = {
    "world_size": 32, "tensor_parallel": 8, "sequence_parallel": True, "micro_batch_tokens": 16384,
    "logits_chunk_tokens": 4096, "recompute": "full",
}  # fmt: skip
ENGINES = {"engines": 8, "tensor_parallel": 4}
ONE_NODE: dict[str, dict[str, Any]] = {
    "trainer": {"world_size": 8, "micro_batch_tokens": 20480},
    "inference": {"engines": 1, "tensor_parallel": 8},
}


def shape_of(name: str) -> ModelShape:
    return read_hf_config(MODELS / name)


def config_of(name: str, **tables: Mapping[str, Any]) -> Config:
    """A run of the model `name`."""
    model = {"path": str(MODELS / name)} | dict(tables.pop("model", {}))
    return configuration(model=model, **tables)


def given_for(config: Config, gpu: str = "h100", layers: Layers = Layers.ENGINE, **fields: Any) -> Given:
    """With assumed lengths, unless `lengths` says others."""
    lengths: Lengths = fields.pop("lengths", None) or assumed(
        config.rollout.prompts_per_step * config.rollout.group_size,
        longest=config.rollout.max_response_tokens,
        longest_prompt=config.data.max_prompt_tokens,
    )
    return Given(Machine(GPUS[gpu], fields.pop("constants", CONSTANTS), layers), lengths, **fields)


def plan_of(name: str = "qwen3-32b", *, gpu: str = "h100", nodes: int = 0, **tables: dict[str, Any]) -> Plan:
    base = {"rollout": ROLLOUT, "trainer": TRAINER, "inference": ENGINES}
    config = config_of(name, **tables | {k: base[k] | tables.get(k, {}) for k in base})
    return make(config, shape_of(name), given_for(config, gpu, nodes=nodes))
