"""A push reaches an engine whose matrices are quantized: vLLM's own worker and kernels, on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from stare_megatron.host import device
from tests import programs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    here, there = (checkpoints.make("qwen2", tmp_path_factory.mktemp(f"seed{seed}"), seed) for seed in (0, 1))
    import os

    environment = os.environ | device.engine_environment() | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests/invariance/quantized_worker.py"), str(here), str(there)]
    done = programs.run(command, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_matrices_of_layers_are_kept_in_float8(found) -> None:
    assert "torch.float8_e4m3fn" in found["types"]
    assert {"model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"} <= set(found["quantized"])
    assert 1e-4 < found["error"] < 2.0**-4, "of three bits beside the first"


def test_their_tensors_come_whole_and_the_others_in_parts(found) -> None:
    assert found["modules"] == found["quantized"]
    assert "model.layers.0.mlp.gate_proj.weight" in found["whole"]
    assert "model.layers.0.self_attn.k_proj.bias" in found["whole"]
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(found["cut"])
    assert not set(found["whole"]) & set(found["cut"])


def test_every_parameter_gets_what_was_sent_again_and_again(found) -> None:
    """In parts, and back, and as whole tensors: what is kept is what loading those weights gives, bit for bit."""
    assert found["unchanged"] == []
    assert found["not back"] == []
    assert found["other by whole tensors"] == []


def test_checksums_are_of_what_is_kept_as_it_was_sent(found) -> None:
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(found["summed"])
    assert not [name for name in found["summed"] if "_proj" in name]
