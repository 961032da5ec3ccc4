"""float16 with a scaled loss: the gradient of float32, overflows that change nothing, and a scale that is saved."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from launch import launch
from step_cases import make_checkpoint

SCALE = 2.0**12
HALF: dict[str, Any] = {"dtype": "float16"}
TOO_LARGE = 2.0**32


def case(scale: float = SCALE, **trainer: Any) -> dict[str, dict[str, Any]]:
    optimizer = {"lr": 1e-3, "initial_loss_scale": scale, "loss_scale_window": 2}
    return {"model": HALF, "trainer": {"micro_batch_tokens": 64, "optimizer": optimizer} | trainer}


LAYOUTS = {
    1: {"one rank": case(), "logits in chunks": case(logits_chunk_tokens=16)},
    2: {
        "TP2": case(world_size=2, tensor_parallel=2),
        "DP2": case(world_size=2),
        "DP2, whole optimizer": case(world_size=2, distributed_optimizer=False),
        "PP2": case(world_size=2, pipeline_parallel=2),
    },
}
OVERFLOWS = {"DP2, too large a scale": case(TOO_LARGE, world_size=2)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="module")
def found(checkpoint) -> dict[str, Any]:
    """What the first rank saw, by case; three batches each."""
    whole = {"float32": {"trainer": {"micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}}}} | LAYOUTS[1]
    split = LAYOUTS[2] | OVERFLOWS
    seen: dict[str, Any] = {}
    for ranks, cases in ((1, whole), (2, split)):
        cases = {name: tables | {"batch": {"count": 3}} for name, tables in cases.items()}
        cases["no step"] = case(world_size=ranks) | {"batch": {"count": 0}}
        seen |= launch("step_cases:many", ranks, {"checkpoint": checkpoint, "cases": cases})[0]
    return seen


@pytest.mark.parametrize("name", [*LAYOUTS[1], *LAYOUTS[2]])
def test_the_gradient_is_that_of_float32(found, name):
    """float16 has 11 bits; a gradient sums some hundred terms of either sign."""
    want, got = found["float32"]["gradient"], found[name]["gradient"]
    dot = norm = size = 0.0
    for parameter, values in want.items():
        a, b = values.double(), got[parameter].double() / SCALE
        assert float((a - b).norm()) < 0.05 * float(a.norm()) + 1e-6, parameter
        dot, norm, size = dot + float((a * b).sum()), norm + float(a.square().sum()), size + float(b.square().sum())
    assert dot / (norm * size) ** 0.5 > 0.9999
    for mine, theirs in zip(found[name]["stats"], found["float32"]["stats"], strict=True):
        assert mine["update/grad_norm"] == pytest.approx(theirs["update/grad_norm"], rel=0.02)
        assert mine["update/overflows"] == 0
    assert np.abs(found[name]["probe"] - found["float32"]["probe"]).max() < 0.02


@pytest.mark.parametrize("name", [*LAYOUTS[1], *LAYOUTS[2]])
def test_the_scale_doubles_after_the_window(found, name):
    assert [s["update/loss_scale"] for s in found[name]["stats"]] == [SCALE, SCALE, 2 * SCALE]


def test_an_overflow_halves_the_scale_and_changes_no_weight(found):
    seen = found["DP2, too large a scale"]
    assert [s["update/loss_scale"] for s in seen["stats"]] == [TOO_LARGE, TOO_LARGE / 2, TOO_LARGE / 4]
    assert [s["update/overflows"] for s in seen["stats"]] == [1, 1, 1]
    assert "update/grad_norm" not in [m.name for s in seen["stats"] for m in s.measured]
    assert np.array_equal(seen["probe"], found["no step"]["probe"])


def test_the_scale_is_saved(checkpoint, tmp_path):
    """Begun too large, saved after an overflow; the run that goes on and the one that is resumed do the same."""
    first = case(TOO_LARGE, world_size=2, tensor_parallel=2)
    pairs = {"same": (first, first), "other": (first, case(SCALE, world_size=2))}
    arguments = {"checkpoint": checkpoint, "folder": tmp_path, "layouts": pairs}
    for seen, name in itertools.product(launch("step_cases:resume", 2, arguments), pairs):
        for got, want in zip(seen[name]["resumed"], seen[name]["went_on"], strict=True):
            assert got["update/loss_scale"] == want["update/loss_scale"] == TOO_LARGE / 2
            assert got["update/overflows"] == want["update/overflows"]


def test_a_weight_beyond_float16_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "qwen2", layers=1)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = 7e4
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=r"norm\.weight has values beyond float16"):
        launch("step_cases:many", 1, {"checkpoint": folder, "cases": {"one rank": case()}})
