"""What replay does to the mismatch with a real vLLM, in bfloat16, on a random Qwen3-MoE."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from replay_engine import REQUESTS, TOKENS, VOCAB

from stare_megatron.host import device

pytestmark = pytest.mark.timeout(1200)


def checkpoint(folder: Path) -> Path:
    """8 layers, 4 of 32 experts."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=128,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        initializer_range=0.06,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, float]]:
    """Metrics without and with replay, of one batch."""
    folder = tmp_path_factory.mktemp("replay")
    path, out = checkpoint(folder / "model"), folder / "sampled"
    script = Path(__file__).with_name("replay_engine.py")
    environment = os.environ | device.engine_environment() | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(out)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sampled: list[Any] = pickle.loads(out.read_bytes())
    for prompt, response, logprobs, experts in sampled:
        assert len(response) == len(logprobs) == TOKENS
        assert experts.shape == (len(prompt) + TOKENS - 1, 8, 4)  # all tokens that were read
    assert len(sampled) == REQUESTS
    return launch("replay_cases:mismatch", 1, {"checkpoint": path, "sampled": sampled})[0]


@pytest.mark.runs
def test_most_of_the_mismatch_is_routing(measured):
    without, replayed = measured[False], measured[True]
    assert without["mismatch/mean"] > 1e-3  # there is something to mend
    assert replayed["mismatch/mean"] < without["mismatch/mean"] / 2
    assert replayed["mismatch/max"] < without["mismatch/max"] / 2
    assert replayed["mismatch/kl"] < without["mismatch/kl"] / 5
    assert replayed["mismatch/sequence_ess"] > without["mismatch/sequence_ess"]
