"""Controllers and the moving target entropy, against values worked out by hand; their state in checkpoints."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stare_megatron import checkpoint
from stare_megatron.algo import controller
from stare_megatron.algo.controller import ControllerState
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.checkpoint import LoopState, store
from stare_megatron.config import AlgorithmConfig, parse
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import UserError
from stare_megatron.types import EntropyReading, GateDuty, Observed
from tests.configs import MINIMAL

PI: dict[str, Any] = {
    "controller": "proportional_integral",
    "target_entropy": 0.2,
    "weight_pos": 3.0,
    "weight_neg": 0.5,
    "kp": 10.0,
    "ki": 2.0,
}


def config(method: Any = "stare", **stare: Any) -> AlgorithmConfig:
    return parse(MINIMAL | {"algorithm": {"method": method, "stare": stare}}, "x.toml").algorithm


def observed(settings: AlgorithmConfig, entropies, state: ControllerState | None = None):
    """The state after all steps, and each step's `Control`."""
    state = state or controller.initial(settings)
    controls = []
    for entropy in entropies:
        state, control = ALGORITHMS[settings.method].controller(settings, state, EntropyReading(1, entropy))
        controls.append(control)
    return state, controls


def test_proportional_integral():
    # e = -0.4, 0.05, 0.1, 0.2, -0.02, -0.1; integral term 0, 0.1, 0.3, 0.7, 0.66, 0.46; u in [0, 2]
    state, controls = observed(config(**PI), (0.6, 0.15, 0.1, 0.0, 0.22, 0.3))
    assert [c.gate_on for c in controls] == [False, True, True, True, True, False]
    assert [c.weight_pos for c in controls] == pytest.approx([1.0, 1.6, 2.3, 3.0, 1.46, 1.0])
    assert [c.weight_neg for c in controls] == pytest.approx([1.0, 0.85, 0.675, 0.5, 0.885, 1.0])
    assert state.integral == pytest.approx(0.46)
    assert (state.weight_pos, state.weight_neg, state.steps) == (3.0, 0.5, 6)


def test_integral_does_not_wind_up():
    settings = config(**PI)
    above, _ = observed(settings, [5.0] * 100)
    below, _ = observed(settings, [0.0] * 100)
    assert (above.integral, below.integral) == (0.0, 2.0)
    # One step back at the target: u is the integral term.
    assert observed(settings, [0.2], above)[1][0].weight_pos == 1.0
    assert observed(settings, [0.2], below)[1][0].weight_pos == 3.0


def test_only_the_integral_term_holds_a_weight_at_the_target():
    settings = config(**PI | {"ki": 0.0})
    state, controls = observed(settings, (0.1, 0.2))
    assert state.integral == 0.0
    assert [(c.gate_on, c.weight_pos) for c in controls] == [(True, pytest.approx(2.0)), (False, 1.0)]


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("linear", [0.4, 0.35, 0.3, 0.25, 0.2, 0.2]),
        ("cosine", [0.4, 0.3 + 0.1 / math.sqrt(2), 0.3, 0.3 - 0.1 / math.sqrt(2), 0.2, 0.2]),
    ],
)
@pytest.mark.parametrize("method", ["stare", "grpo"])
def test_target_moves_over_the_run(method, schedule, want):
    settings = config(method, target_schedule=schedule, target_entropy=0.4, target_entropy_end=0.2)
    assert settings.stare.target_steps == 5
    _, controls = observed(settings, [0.3] * 6)
    assert [c.target for c in controls] == pytest.approx(want)
    gate = [False] * 6 if method == "grpo" else [c.target > 0.3 for c in controls]
    assert [c.gate_on for c in controls] == gate
    assert any(gate) == (method == "stare")


def test_target_can_rise_and_arrive_before_the_end():
    settings = config(target_schedule="linear", target_entropy=0.1, target_entropy_end=0.3, target_steps=3)
    assert [c.target for c in observed(settings, [0.2] * 5)[1]] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])


def test_proportional_and_adaptive_follow_the_moving_target():
    moving = {"target_schedule": "linear", "target_entropy": 0.4, "target_entropy_end": 0.2, "weight_pos": 1.4}
    _, controls = observed(config(controller="proportional", band=0.5, **moving), (0.3, 0.3, 0.35))
    assert [c.gate_on for c in controls] == [True, True, False]
    assert [c.weight_pos for c in controls[:2]] == pytest.approx([1.2, 1.0 + 0.4 * 0.05 / 0.175])
    # Targets 0.4, 0.35, 0.3, 0.25, 0.2: up, up (at the bound 1.5), then three times down.
    _, controls = observed(config(adaptive=True, alpha=0.1, **moving), [0.31] * 5)
    assert [c.weight_pos for c in controls] == pytest.approx([1.5, 1.5, 1.4, 1.3, 1.2])


@pytest.mark.parametrize("ki", [0.0, 2.0])
def test_a_resumed_controller_goes_on_as_if_it_had_never_stopped(tmp_path, ki):
    moving = {"target_schedule": "cosine", "target_entropy": 0.3, "target_entropy_end": 0.1}
    settings = config(**PI | moving | {"ki": ki})
    entropies = (0.26, 0.24, 0.21, 0.15, 0.12)
    state, first = observed(settings, entropies[:3])
    saved = LoopState(3, 9, StreamState(0, 6, 1, "x"), state, Observed(0.2, -0.1), GateDuty(3, 1), wandb_run="ab")
    folder = store.begin(tmp_path, saved, checkpoint.Settings({}, {}))
    resumed = checkpoint.read(folder)
    assert resumed == saved
    assert first + observed(settings, entropies[3:], resumed.controller)[1] == observed(settings, entropies)[1]


@pytest.mark.parametrize(
    ("stare", "message"),
    [
        ({"kp": 1.0}, r'stare.kp is for stare.controller = "proportional_integral"'),
        ({"controller": "proportional", "ki": 1.0}, r"stare.ki is for"),
        (PI | {"band": 0.1}, r'stare.band is for stare.controller = "proportional"$'),
        (PI | {"adaptive": True}, r"stare.adaptive is for"),
        (PI | {"weight_pos": 1.0}, r"stare.weight_pos = 1.0: the bound .* must be above 1"),
        (PI | {"kp": 0.0, "ki": 0.0}, r"stare.kp and stare.ki are both 0"),
        ({"target_entropy_end": 0.1}, r"stare.target_entropy_end is for stare.target_schedule"),
        ({"target_steps": 10}, r"stare.target_steps is for stare.target_schedule"),
        ({"target_schedule": "linear"}, r'stare.target_schedule = "linear" needs stare.target_entropy_end'),
        ({"target_schedule": "cosine", "target_entropy_end": 0.3}, r"target_entropy_end = 0.3 is stare.target_entropy"),
    ],
)
def test_settings_without_effect_are_refused(stare, message):
    with pytest.raises(UserError, match=message):
        config(**stare)


@pytest.mark.parametrize(
    "stare", [PI, PI | {"target_schedule": "linear", "target_entropy_end": 0.1}, {"controller": "proportional"}]
)
def test_written_settings_can_be_read(stare):
    run = parse(MINIMAL | {"algorithm": {"stare": stare}}, "x.toml")
    assert parse(run.model_dump(mode="json"), "x.toml") == run
