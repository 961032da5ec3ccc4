"""Every option of [trainer.megatron] that is taken on this machine does something, and not to the numbers."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
from launch import launch
from options_worker import OPTIONS

from stare_megatron.config import upstream

# Seen in the layout that they give, which other tests of this folder and tests/unit/models/test_bridge.py train with.
ELSEWHERE = {"expert_tensor_parallel_size", "microbatch_group_size_per_vp_stage"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("options")
    paths = {"dense": str(checkpoints.make("qwen2", folder)), "experts": str(checkpoints.make("qwen3_moe", folder))}
    return launch("options_worker:run", 1, paths)[0]


def test_every_option_is_tried() -> None:
    engine = {name for name, option in upstream.MEGATRON_OPTIONS.items() if option.needs == "transformer_engine"}
    assert OPTIONS.keys() | ELSEWHERE | engine == upstream.MEGATRON_OPTIONS.keys()


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_does_something_and_the_gradients_stay(found: dict[str, Any], option: str) -> None:
    changed, difference = found[option]
    assert changed
    assert difference < 1e-5
