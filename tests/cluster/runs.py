"""The demo as a run of a few steps on a cluster of machines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from stare_megatron.metrics import jsonl
from stare_megatron.metrics.catalogue import COSTS
from tests.cluster.machines import ROOT

STEPS = 2
SMALL = {"trainer.tensor_parallel": 1, "trainer.world_size": 2, "inference.engines": 2}


def words(shared: Path, runs: Path, example: str = "demo_cpu", /, **keys: Any) -> list[str]:
    """The run's file, and what it has otherwise."""
    settings = {
        "run.dir": runs,
        "run.name": "demo",
        "run.steps": STEPS,
        "model.path": shared / "material/model",
        "data.train": json.dumps([str(shared / "material/train.jsonl")]),
        "rollout.prompts_per_step": 4,
        "logging.wandb": "disabled",
        "logging.samples_every": 1,
        "cluster.address": "auto",
        "checkpoint.every": 2,
    } | keys
    return [str(ROOT / "examples" / example / "run.toml"), *(f"{key}={value}" for key, value in settings.items())]


def command(shared: Path, runs: Path, example: str = "demo_cpu", /, **keys: Any) -> list[str]:
    return [sys.executable, "-m", "stare_megatron", "train", *words(shared, runs, example, **keys), "--quiet"]


def learned(run: Path) -> list[dict[str, str]]:
    """What the steps found and did, without what it cost; as text, since NaN is not equal to itself."""
    rows = jsonl.read(run / "metrics.jsonl")
    return [{name: repr(x) for name, x in row.items() if not name.startswith(COSTS)} for row in rows]


def steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in jsonl.read(run / "metrics.jsonl")]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 800
    while not (run / "metrics.jsonl").exists() or len(jsonl.read(run / "metrics.jsonl")) < step:
        assert time.monotonic() < deadline, f"no step {step} within 800 s"
        time.sleep(0.2)
