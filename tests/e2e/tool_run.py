"""The tool-use example as a short run, on a model and prompts made for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings


def make_material(folder: Path) -> Path:
    """A tiny model that has learned a bit, and prompts."""
    make(default_settings("tool_arithmetic", layers=2, seed=3), folder, 512, 16)
    return folder


def command(material: Path, runs: Path, *, steps: int, **more: object) -> list[str]:
    """The run's own folder is `runs`/tool. `more`: keys of its configuration."""
    keys: dict[str, object] = {
        "run.dir": runs,
        "run.name": "tool",
        "run.steps": steps,
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "eval.benchmarks": "[]",
        "rollout.prompts_per_step": 16,
        "checkpoint.export_final": "false",
        "env.tool_seconds": 120,  # a product is no matter of seconds, but for a machine that stands still
        "sandbox.wall_seconds": 120,
    } | more
    start = [sys.executable, "-m", "stare_megatron", "train", "examples/tool_use_cpu/run.toml", "--quiet"]
    return [*start, *(f"{key}={value}" for key, value in keys.items())]
