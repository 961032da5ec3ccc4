"""`[inference.vllm]` is checked without importing vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stare_megatron.config.upstream import ENGINE_OPTIONS, check_engine_args, engine_arg_names
from stare_megatron.errors import UserError


def test_names_are_those_of_the_installed_vllm() -> None:
    assert {"enforce_eager", "max_num_seqs", "block_size", "enable_log_requests"} <= engine_arg_names()
    assert set(ENGINE_OPTIONS) <= engine_arg_names()


def test_vllm_is_not_imported_for_its_options() -> None:
    code = (
        "import sys; from stare_megatron.config.upstream import check_engine_args; "
        "check_engine_args({'enforce_eager': True}); sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_known_options_pass() -> None:
    check_engine_args({"enforce_eager": True, "gpu_memory_utilization": 0.5, "block_size": 32})


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("max_num_sequences", "did you mean 'max_num_seqs'"),
        ("tensor_parallel_size", "inference.tensor_parallel"),
        ("logprobs_mode", "the run depends"),
    ],
)
def test_others_are_refused_with_a_cure(key: str, cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        check_engine_args({key: 1})
