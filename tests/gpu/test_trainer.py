"""A whole trainer rank on a GPU: what it computes is what it computes on a CPU, and what it saves is what it had.

Gradients are summed by atomic additions there, so that runs agree to rounding, not bit for bit. One GPU: NCCL's groups
have one rank each.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import launch
from step_cases import Overrides, make_checkpoint

from stare_megatron.convert.inspection import McoreTensors, differences
from stare_megatron.convert.torch_dist import TorchDist

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

PLAIN: Overrides = {"trainer": {"micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}}}
CASES: dict[str, Overrides] = {
    "plain": PLAIN,
    "one optimizer": {"trainer": PLAIN["trainer"] | {"distributed_optimizer": False}},
    "chunked logits": {"trainer": PLAIN["trainer"] | {"logits_chunk_tokens": 7}},
    "all recomputed": {"trainer": PLAIN["trainer"] | {"recompute": "full"}},
    "two updates": {"trainer": PLAIN["trainer"] | {"updates_per_batch": 2}},
    "sensitivity": {"algorithm": {"method": "stare", "stare": {"variant": "O1", "selector": "sensitivity"}}},
    "from the rollout": {"trainer": PLAIN["trainer"] | {"scoring": "rollout"}},
    "entropy bonus": {"algorithm": {"method": "entropy_bonus"}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


def on(place: str, target: str, arguments: dict[str, Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARE_DEVICE", place)
        return launch(target, 1, arguments, timeout=400)[0]


@functools.cache
def steps(place: str, model: Path, dtype: str) -> dict[str, dict[str, Any]]:
    cases = {name: overrides | {"model": {"dtype": dtype}} for name, overrides in CASES.items()}
    return on(place, "step_cases:many", {"checkpoint": model, "cases": cases})


@pytest.mark.parametrize("name", CASES)
def test_float32_is_the_cpus(model, name):
    got, want = (steps(place, model, "float32")[name] for place in ("cuda", "cpu"))
    assert got["selected"][0] == want["selected"][0]
    assert got["readings"][0].entropy == pytest.approx(want["readings"][0].entropy, abs=1e-5)
    assert got["readings"][1].entropy == pytest.approx(want["readings"][1].entropy, abs=1e-4)
    assert got["stats"][0]["update/loss"] == pytest.approx(want["stats"][0]["update/loss"], abs=1e-5)
    assert got["stats"][0]["update/grad_norm"] == pytest.approx(want["stats"][0]["update/grad_norm"], rel=1e-4)
    for weight, gradient in want["gradient"].items():
        assert (got["gradient"][weight] - gradient).norm() <= 1e-4 * gradient.norm(), weight
    # Adam's first step is nearly the gradient's sign: rounding of gradients near 0 comes back enlarged.
    np.testing.assert_allclose(got["probe"], want["probe"], atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_near(model, name):
    got, want = steps("cuda", model, "bfloat16")[name], steps("cpu", model, "float32")[name]
    for reading, exact in zip(got["readings"], want["readings"], strict=True):
        assert reading.entropy == pytest.approx(exact.entropy, abs=2e-2)
    assert got["stats"][0]["update/grad_norm"] == pytest.approx(want["stats"][0]["update/grad_norm"], rel=0.1)


def test_mixture_of_experts(tmp_path):
    import checkpoints

    moe = checkpoints.make("qwen3_moe", tmp_path)
    arguments = {"checkpoint": moe, "cases": {"plain": PLAIN}}
    got, want = (on(place, "step_cases:many", arguments)["plain"] for place in ("cuda", "cpu"))
    assert got["readings"][0].entropy == pytest.approx(want["readings"][0].entropy, abs=1e-5)
    assert got["stats"][0]["update/grad_norm"] == pytest.approx(want["stats"][0]["update/grad_norm"], rel=1e-4)


def test_it_goes_on_from_what_it_saved(model, tmp_path):
    arguments = {"checkpoint": model, "folder": tmp_path, "layouts": {"same": (PLAIN, PLAIN)}}
    seen = on("cuda", "step_cases:resume", arguments)["same"]
    assert seen["step"] == 7
    np.testing.assert_array_equal(seen["probe"], seen["restored_probe"])
    for resumed, went_on in zip(seen["resumed"], seen["went_on"], strict=True):
        assert resumed["update/loss"] == pytest.approx(went_on["update/loss"], abs=1e-6)
        assert resumed["update/grad_norm"] == pytest.approx(went_on["update/grad_norm"], rel=1e-5)


def test_a_save_in_the_background_is_of_the_state_when_it_began(model, tmp_path):
    arguments = {"checkpoint": model, "layout": PLAIN, "folder": tmp_path}
    said, reused = on("cuda", "saving_cases:in_background", arguments)
    assert (said, reused) == ([False, True] * 3, True)
    for number in range(3):
        one, other = (
            McoreTensors(TorchDist(tmp_path / f"{kind}-{number}"), optimizer=True) for kind in ("at_once", "later")
        )
        assert any("exp_avg" in name for name in one.infos)
        assert list(differences(one, other)) == []


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(model, tmp_path):
    arguments = {"checkpoint": model, "layout": PLAIN, "source": None, "out": tmp_path / "gpu"}
    there, _ = on("cuda", "saving_cases:reshard", arguments)
    here, _ = on("cpu", "saving_cases:reshard", arguments | {"source": tmp_path / "gpu", "out": tmp_path / "cpu"})
    assert here["update/loss"] == pytest.approx(there["update/loss"], abs=1e-5)
    assert here["update/grad_norm"] == pytest.approx(there["update/grad_norm"], rel=1e-4)
