"""Engine and rank in float16: the engine samples in it, the rank trains in it with a scaled loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from stare_megatron.metrics import jsonl
from stare_megatron.sync.check import BOUNDS
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs
from tests.contracts.source import ROOT

pytestmark = pytest.mark.runs


@pytest.mark.timeout(1800)
def test_two_steps_and_one_more_after_a_resume(tmp_path: Path) -> None:
    material = tmp_path / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), material, 256, 8)
    settings: dict[str, object] = {
        "run.dir": tmp_path,
        "run.name": "half",
        "model.path": material / "model",
        "model.dtype": "float16",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "trainer.world_size": 1,
        "checkpoint.every": 2,
        "logging.wandb": "disabled",
    }
    command = [sys.executable, "-m", "stare_megatron", "train", str(ROOT / "examples/demo_cpu/run.toml"), "--quiet"]
    command += [f"{key}={value}" for key, value in settings.items()]
    for more in (["run.steps=2"], ["run.steps=3", "run.resume=auto"]):
        done = programs.run([*command, *more], cwd=ROOT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = jsonl.read(tmp_path / "half" / jsonl.FILE)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["sync/weight_version"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["sync/probe"] <= BOUNDS["float16"]
        # Both round to 11 bits, in other places: in float32 they are 1e-6 apart, in bfloat16 some 1e-2.
        assert 1e-5 < row["mismatch/mean"] < 5e-3
        assert row["update/grad_norm"] > 0
    assert rows[-1]["update/loss_scale"] > 0
