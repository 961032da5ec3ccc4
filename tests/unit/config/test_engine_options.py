"""`[inference.vllm]` is checked without importing vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stare_megatron.config import InferenceConfig
from stare_megatron.config.inference import SpeculativeConfig
from stare_megatron.config.upstream import ENGINE_OPTIONS, check_engine_args, engine_arg_names
from stare_megatron.errors import UserError
from stare_megatron.models.families import read_hf_config
from stare_megatron.run import preflight
from tests.configs import configuration, small_model


def test_names_are_those_of_the_installed_vllm() -> None:
    assert {"enforce_eager", "max_num_seqs", "block_size", "enable_log_requests"} <= engine_arg_names()
    assert set(ENGINE_OPTIONS) <= engine_arg_names()


def test_vllm_is_not_imported_for_its_options() -> None:
    code = (
        "import sys; from stare_megatron.config.upstream import check_engine_args; "
        "check_engine_args({'enforce_eager': True}); sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


def test_known_options_pass() -> None:
    check_engine_args({"enforce_eager": True, "gpu_memory_utilization": 0.5, "block_size": 32})


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("max_num_sequences", "did you mean 'max_num_seqs'"),
        ("tensor_parallel_size", "inference.tensor_parallel"),
        ("logprobs_mode", "the run depends"),
        ("speculative_config", "set inference.speculative instead"),
    ],
)
def test_others_are_refused_with_a_cure(key: str, cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        check_engine_args({key: 1})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "eagle3"}, "weights of its own"),
        ({"method": "suffix"}, "arctic-inference"),
        ({"method": "ngram_gpu"}, "not held to it"),
        ({"method": "ngram", "ngram_min": 5}, "ngram_min = 5 is more than ngram_max = 4; lower it"),
    ],
)
def test_drafts_that_do_not_work_are_refused_with_why(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SpeculativeConfig(**settings)


def test_what_does_not_go_with_drafts_is_refused() -> None:
    on = SpeculativeConfig(method="ngram", tokens=3)
    with pytest.raises(ValidationError, match="does not go with routing_replay"):
        InferenceConfig(speculative=on, routing_replay=True)
    with pytest.raises(ValidationError, match=r"31 is less than vllm.max_num_seqs = 8 sequences with .* = 4 each"):
        InferenceConfig(speculative=on, vllm={"max_num_seqs": 8, "max_num_batched_tokens": 31})
    InferenceConfig(speculative=on, vllm={"max_num_seqs": 8, "max_num_batched_tokens": 32})


def test_engines_on_cpus_do_not_place_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's kernel reads past those of its worker: the process dies in its first step."""
    path = small_model(tmp_path / "moe", experts=4)

    def check(placed: bool) -> None:
        inference = {"tensor_parallel": 2, "vllm": {"enable_expert_parallel": placed}}
        config = configuration(model={"path": str(path)}, inference=inference)
        preflight.check_engine_options(config, read_hf_config(path))

    monkeypatch.setattr(preflight, "on_gpus", lambda _: True)
    check(True)
    monkeypatch.setattr(preflight, "on_gpus", lambda _: False)
    check(False)
    with pytest.raises(UserError, match=r"enable_expert_parallel = true: .* take it out: inference\.tensor_parallel"):
        check(True)
