"""Runs of known models for the planner's tests; their config.json are in tests/data/models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stare_megatron.config import Config
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.estimate import Given
from stare_megatron.plan.hardware import CONSTANTS, GPUS
from stare_megatron.plan.lengths import Lengths, assumed
from stare_megatron.plan.timing import Machine
from tests.configs import configuration

MODELS = Path(__file__).parents[2] / "data" / "models"


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
