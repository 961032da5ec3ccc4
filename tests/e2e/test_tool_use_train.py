"""Tool use through the whole loop: Ray, a vLLM engine, Megatron ranks, the pool of sandboxes, the generated task."""

from __future__ import annotations

import json
import subprocess
import sys

from stare_megatron.metrics import jsonl
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests.contracts.source import ROOT

STEPS = 6


def test_a_policy_trains_with_the_tool(tmp_path):
    """Calls are made and answered, right answers come of them, engine and trainer agree over observations, and the
    run says at which level code was run."""
    material = tmp_path / "material"
    make(default_settings("tool_arithmetic", layers=2, seed=3), material, 512, 16)
    keys = {
        "run.dir": tmp_path,
        "run.name": "tool",
        "run.steps": STEPS,
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "eval.benchmarks": "[]",
        "rollout.prompts_per_step": 16,
        "rollout.prompts_per_generation": 20,
        "checkpoint.export_final": "false",
    }
    command = [sys.executable, "-m", "stare_megatron", "train", "examples/tool_use_cpu/run.toml", "--quiet"]
    done = subprocess.run(
        [*command, *(f"{key}={value}" for key, value in keys.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = jsonl.read(tmp_path / "tool/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["mismatch/mean"] < 1e-3
        assert 0.4 < row["tools/calls"] < 2
        assert row["tools/turns"] > 1
        assert row["tools/observation_tokens"] > 4
        assert row["tools/call_errors"] < 0.7
        assert 0.1 < row["reward/mean"] < 1
        assert row["response/failed"] == 0
    start = json.loads((tmp_path / "tool/run.json").read_text())["starts"][0]
    assert start["sandbox"].startswith("level ")
