"""Supervised training against transformers, over layouts, and across a checkpoint."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import step_cases
import supervised_cases
from launch import free_port, launch
from supervised_cases import Learned

TP2, PP2, CP2 = ({f"{kind}_parallel": 2} for kind in ("tensor", "pipeline", "context"))
TWO_RANKS: list[dict[str, Any]] = [{}, TP2 | {"sequence_parallel": True}, PP2, CP2]
FOUR_RANKS: list[dict[str, Any]] = [TP2 | PP2, {}]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="supervised-")


@functools.cache
def checkpoint() -> Path:
    return step_cases.make_checkpoint(Path(_folder().name, "model"))


def learned(ranks: int, layouts: list[dict[str, Any]], **more: str) -> list[list[Learned]]:
    """By layout, then by rank."""
    arguments = {"path": str(checkpoint()), "layouts": [(free_port(), layout) for layout in layouts]} | more
    by_rank = launch("supervised_cases:learn", ranks, arguments)
    return [list(column) for column in zip(*by_rank, strict=True)]


@functools.cache
def alone() -> Learned:
    return learned(1, [{}])[0][0]


def test_five_steps_are_those_of_transformers() -> None:
    """Loss to 1e-5 at each step, gradients of each parameter, held-out loss, and the weights after the last step."""
    want, got = supervised_cases.reference(checkpoint()), alone()
    assert len(got.stats) == supervised_cases.STEPS
    for step, (mine, theirs) in enumerate(zip(got.stats, want.stats, strict=True)):
        assert mine["update/loss"] == pytest.approx(theirs["update/loss"], abs=1e-5), step
        assert mine["update/grad_norm"] == pytest.approx(theirs["update/grad_norm"], rel=1e-4), step
    for mine, theirs in zip(got.held_out, want.held_out, strict=True):
        assert mine.weight == theirs.weight
        assert mine.value == pytest.approx(theirs.value, abs=1e-5)
    for name, gradient in want.gradients[0].items():
        assert (got.gradients[0][name] - gradient).abs().max() < 1e-6 + 1e-4 * gradient.abs().max(), name
    for name, weight in want.weights.items():
        # Adam makes a step of lr of the rounding of a gradient near 0: the mean is what tells.
        assert (got.weights[name] - weight).abs().mean() < 1e-5, name
    assert want.stats[-1]["update/loss"] < want.stats[0]["update/loss"] - 0.1, "nothing was learned"


@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_layouts_agree(ranks: int, layouts: list[dict[str, Any]]) -> None:
    one = alone()
    for layout, results in zip(layouts, learned(ranks, layouts), strict=True):
        for got in results:
            for n, (mine, want) in enumerate(zip(got.stats, one.stats, strict=True)):
                assert mine["update/loss"] == pytest.approx(want["update/loss"], abs=2e-5), (layout, n)
                assert mine["update/grad_norm"] == pytest.approx(want["update/grad_norm"], rel=1e-3), (layout, n)
                assert mine["policy/entropy"] == pytest.approx(want["policy/entropy"], abs=2e-5), (layout, n)
                assert mine["throughput/trained_tokens"] == want["throughput/trained_tokens"]
            assert [m.weight for m in got.held_out] == [m.weight for m in one.held_out]
            assert [m.value for m in got.held_out] == pytest.approx([m.value for m in one.held_out], abs=2e-5)
        for name, gradient in one.gradients[0].items():
            difference = (results[0].gradients[0][name] - gradient).abs().max()
            assert difference < 1e-6 + 1e-4 * gradient.abs().max(), (layout, name)
        for name, weight in one.weights.items():
            assert (results[0].weights[name] - weight).abs().mean() < 1e-5, (layout, name)


@pytest.mark.parametrize("layout", [{}, TP2], ids=str)
def test_a_resumed_run_is_bit_equal(layout: dict[str, Any], tmp_path: Path) -> None:
    import torch

    whole = learned(2, [layout], save=str(tmp_path / "trainer"))[0][0]
    resumed = learned(2, [layout], resume=str(tmp_path / "trainer"))[0][0]
    assert resumed.stats == whole.stats[3:]
    assert resumed.held_out == whole.held_out[3:]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
