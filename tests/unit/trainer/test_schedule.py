"""The learning rate, step by step."""

from __future__ import annotations

import pytest

from stare_megatron.config import OptimizerConfig
from stare_megatron.trainer.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.882843, 0.6, 0.317157, 0.2]),
    ],
)
def test_warm_up_then_decay(schedule: str, rates: list[float]) -> None:
    end = 0.0 if schedule == "constant" else 0.2
    settings = OptimizerConfig(lr=1.0, warmup_steps=3, schedule=schedule, min_lr=end)  # type: ignore[arg-type]
    found = [learning_rate(settings, step, total_steps=8) for step in range(8)]
    assert found == pytest.approx(rates, abs=1e-6)


def test_a_run_may_outlast_its_plan() -> None:
    settings = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="cosine", min_lr=0.1)
    assert learning_rate(settings, 99, total_steps=10) == pytest.approx(0.1)
    assert learning_rate(settings, 0, total_steps=1) == 1.0
