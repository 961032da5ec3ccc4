"""A run whose engine multiplies in float8: what the correction and the alarm see of it, with kernels for CPUs."""

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

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "stare_megatron", "train", str(ROOT / "examples/demo_cpu/run.toml"), "--quiet"]
STEPS, THRESHOLD = 8, 0.2
QUANTIZED: dict[str, Any] = {"inference.quantization": "fp8_per_channel", "sync.probe_threshold": THRESHOLD}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), folder, 512, 32)
    return folder


def train(material: Path, runs: Path, name: str, **keys: Any) -> tuple[int, str]:
    given = {
        "run.dir": runs,
        "run.name": name,
        "run.steps": STEPS,
        "model.path": material / "model",
        "model.dtype": "bfloat16",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "algorithm.correction.mode": "truncate",
        "sync.probe_every": 1,
        "logging.wandb": "disabled",
        "trainer.tensor_parallel": 2,
        "checkpoint.every": 0,
    } | keys
    command = [*COMMAND, *(f"{key}={value}" for key, value in given.items())]
    done = programs.run(command, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.runs
@pytest.mark.timeout(1800)
def test_a_quantized_engine_is_apart_within_its_bound_and_corrected(material: Path, tmp_path: Path) -> None:
    rows: dict[str, list[jsonl.Row]] = {}
    for name, keys in {"plain": {}, "quantized": QUANTIZED}.items():
        code, said = train(material, tmp_path, name, **keys)
        assert code == 0, said[-3000:]
        rows[name] = jsonl.read(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows[name]] == list(range(1, STEPS + 1))
    for plain, quantized in zip(rows["plain"], rows["quantized"], strict=True):
        # Three bits of a fraction beside bfloat16's seven: clearly apart at every step, and far from the alarm.
        assert 2 * plain["mismatch/mean"] < quantized["mismatch/mean"] < THRESHOLD
        assert 0 < quantized["sync/probe"] < THRESHOLD
        assert quantized["mismatch/ess"] > 0.8
