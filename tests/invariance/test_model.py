"""The model on one rank: logits of every family against transformers, packing, attention against its definition."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
from launch import launch

MODELS = [*checkpoints.FAMILIES, *checkpoints.STRETCHED]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {name: str(checkpoints.make(name, folder)) for name in MODELS}
    return launch("model_worker:run", 1, {"paths": paths})[0]


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_transformers(found: dict[str, Any], family: str) -> None:
    """Measured: 1.2e-6 on logits up to 5; bfloat16 drifts by about 0.02 nat a token."""
    difference, largest, drift = found[f"logits {family}"]
    assert difference < 1e-5
    assert largest > 1.0
    assert 0.0 < drift < 0.1


def test_a_pack_is_its_sequences(found: dict[str, Any]) -> None:
    logits, gradient = found["unpacked"]
    assert logits < 1e-5
    assert gradient < 1e-5


def test_attention_is_its_definition(found: dict[str, Any]) -> None:
    output, gradient, independent, cost = found["attention"]
    assert output < 1e-5
    assert gradient < 1e-5
    assert independent
    assert cost < 160, "scores computed, per cent of those of the sequences alone"


@pytest.mark.parametrize("kind", ["llama3", "yarn", "yarn, bounds not rounded", "linear"])
def test_rotary_scaling_with_other_constants(found: dict[str, Any], kind: str) -> None:
    frequencies, attention = found["frequencies"][kind]
    assert frequencies < 1e-6
    assert attention < 1e-12


def test_building_draws_no_random_number(found: dict[str, Any]) -> None:
    assert found["generator"]


def test_upstream_options_are_checked(found: dict[str, Any]) -> None:
    said = found["refused"]
    assert "did you mean 'moe_router_dtype'" in said["moe_router_dtyp"]
    assert "set trainer.tensor_parallel instead" in said["tensor_model_parallel_size"]
    assert "follows from the checkpoint" in said["num_layers"]
    assert "the loss is the method's alone" in said["moe_aux_loss_coeff"]
