"""A run whose ranks give their memory up to the engines learns what one learns whose ranks do not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.metrics import jsonl
from stare_megatron.metrics.catalogue import COSTS
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "stare_megatron", "train", str(ROOT / "examples/demo_cpu/run.toml"), "--quiet"]


EVERYTHING = json.dumps(["gradients", "optimizer", "parameters"])


def settings(material: Path, runs: Path, name: str, **keys: Any) -> list[str]:
    given = {
        "run.dir": runs,
        "run.name": name,
        "run.steps": 4,
        "model.path": material / "model",
        "model.dtype": "bfloat16",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "eval.benchmarks": json.dumps([str(material / "eval.jsonl")]),
        "eval.samples": 2,
        "eval.every": 2,
        "rollout.prompts_per_step": 8,
        "logging.wandb": "disabled",
        "trainer.tensor_parallel": 2,
        "checkpoint.every": 2,
        "checkpoint.export_every": 3,
    } | keys
    return [f"{key}={value}" for key, value in given.items()]


def train(material: Path, runs: Path, name: str, **keys: Any) -> list[dict[str, str]]:
    """What each step found and did, as text, since NaN is not equal to itself."""
    command = [*COMMAND, *settings(material, runs, name, **keys)]
    done = programs.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = jsonl.read(runs / name / "metrics.jsonl")
    return [{key: repr(x) for key, x in row.items() if not key.startswith(COSTS)} for row in rows]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload") / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), folder, 512, 32)
    return folder


@pytest.mark.runs
@pytest.mark.timeout(1800)
def test_engines_and_ranks_take_turns_and_learn_the_same(material: Path, tmp_path: Path) -> None:
    plain = train(material, tmp_path, "plain")
    moved = train(material, tmp_path, "moved", **{"trainer.offload": EVERYTHING})
    assert moved == plain
    for name in ("hf", "exports/step_000003"):
        a, b = ((tmp_path / run / name / "model.safetensors").read_bytes() for run in ("plain", "moved"))
        assert a == b
    rows = jsonl.read(tmp_path / "moved/metrics.jsonl")
    assert all(row["memory/trainer_resident"] == 0 < row["memory/trainer_arena"] for row in rows)
    assert all(row["time/offload"] > 0 < row["time/onload"] for row in rows)
    again = {"trainer.offload": EVERYTHING, "run.resume": tmp_path / "moved/checkpoints/step_000002"}
    assert train(material, tmp_path, "again", **again) == plain[2:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_whose_engine_dies_saves_what_is_away_and_is_evaluated(material: Path, tmp_path: Path) -> None:
    """The engine is killed while it samples, when nothing of a rank is on its device."""
    keys = settings(
        material, tmp_path, "died", **{"trainer.offload": EVERYTHING, "checkpoint.every": 0, "inference.restarts": 0}
    )
    script = str(ROOT / "tests/e2e/killed_run.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, script, "engine", "2", "train", COMMAND[4], "--quiet", *keys]
    done = programs.run(command, cwd=ROOT, env=environment)
    said = done.stdout + done.stderr
    assert done.returncode == 75, said[-3000:]
    assert "step 2 is saved" in said
    saved = tmp_path / "died/checkpoints/step_000002"
    evaluate = [*COMMAND[:3], "eval", COMMAND[4], "--model", str(saved), "--out", str(tmp_path / "eval"), *keys]
    done = programs.run(evaluate, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (alone,) = jsonl.read(tmp_path / "eval/eval.jsonl")
    (during,) = (row for row in jsonl.read(tmp_path / "died/eval.jsonl") if row["step"] == 2)
    scores = {name: value for name, value in during.items() if name.startswith("eval/") and name != "eval/seconds"}
    assert scores
    assert {name: alone[name] for name in scores} == scores
