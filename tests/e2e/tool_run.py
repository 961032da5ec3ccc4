"""The tool-use example as a short run, on a model and prompts made for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings


def command(folder: Path, *, steps: int, **more: object) -> list[str]:
    """Makes what the run needs under `folder`; the run's own folder is `folder`/tool. `more`: keys of its
    configuration."""
    material = folder / "material"
    make(default_settings("tool_arithmetic", layers=2, seed=3), material, 512, 16)
    keys: dict[str, object] = {
        "run.dir": folder,
        "run.name": "tool",
        "run.steps": steps,
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "eval.benchmarks": "[]",
        "rollout.prompts_per_step": 16,
        "checkpoint.export_final": "false",
    } | more
    start = [sys.executable, "-m", "stare_megatron", "train", "examples/tool_use_cpu/run.toml", "--quiet"]
    return [*start, *(f"{key}={value}" for key, value in keys.items())]
