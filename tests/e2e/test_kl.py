"""KL to a reference policy in a whole run: a large coefficient keeps the policy near it, at the price of reward."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.metrics import jsonl
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs
from tests.contracts.source import ROOT

pytestmark = pytest.mark.runs
STEPS = 14


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl") / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), folder, 512, 32)
    return folder


def train(material: Path, runs: Path, name: str, **keys: object) -> list[dict[str, Any]]:
    """The record of a run of GRPO."""
    settings: dict[str, object] = {
        "run.dir": runs,
        "run.name": name,
        "run.steps": STEPS,
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "logging.wandb": "disabled",
        "checkpoint.every": 0,
        "trainer.world_size": 1,
        "algorithm.method": "grpo",
        "algorithm.kl.estimator": "k2",
    } | keys
    command = [sys.executable, "-m", "stare_megatron", "train", str(ROOT / "examples/demo_cpu/run.toml"), "--quiet"]
    command += [f"{key}={value}" for key, value in settings.items()]
    done = programs.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return jsonl.read(runs / name / jsonl.FILE)


def late(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows[-4:]) / 4


@pytest.mark.timeout(1800)
def test_a_large_coefficient_holds_the_policy_at_the_reference(material, tmp_path):
    free = train(material, tmp_path, "free", **{"algorithm.kl.coefficient": 1e-6})
    held = train(material, tmp_path, "held", **{"algorithm.kl.coefficient": 3.0})
    assert free[0]["kl/reference"] == pytest.approx(0.0, abs=1e-6)
    assert late(held, "kl/reference") < 0.5 * late(free, "kl/reference")
    assert late(held, "reward/mean") < late(free, "reward/mean")
    for row in (*free, *held):
        assert row["memory/trainer_reference"] > 0 < row["time/reference"]
        assert row["time/reference"] < row["time/score"]
