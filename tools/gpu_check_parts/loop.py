"""Parts `loop`, `loop-sharded` and `loop-graphs`: the real command on a random model; what its metrics say of time, MFU
and memory."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
import torch

from stare_megatron.metrics import jsonl
from stare_megatron.sync.check import BOUNDS
from stare_megatron.tasks.order_free_sum import OrderFreeSum
from tools.gpu_check_parts import models, speed
from tools.gpu_check_parts.outcome import Context, Outcome, skipped

_PROMPT_TOKENS = 6  # of every prompt, with <bos>
_NAME = "check"
_KEPT = ("time/", "memory/", "throughput/", "rates/push", "sync/probe", "mismatch/")  # metrics that are told of


def check(context: Context) -> Outcome:
    """Four steps, saved after the second and fourth; resumed for two more."""
    return _check(context, {"enforce_eager": True} if context.on_gpu else {}, (4, 6))


def graphs(context: Context) -> Outcome:
    """Two steps with what vLLM does by default on a GPU: it compiles the model and records CUDA graphs."""
    if not context.on_gpu:
        return skipped("a CPU engine has neither")
    return _check(context, {}, (2,))


def sharded(context: Context) -> Outcome:
    """Two steps with sharded pushes, from ranks whose state is away while the engine samples."""
    offload = {"offload": ["gradients", "optimizer", "parameters"]}
    changed = {"sync": {"method": "sharded"}, "trainer": offload}
    return _check(context, {"enforce_eager": True} if context.on_gpu else {}, (2,), changed)


def _check(
    context: Context, engine: dict[str, Any], starts: tuple[int, ...], changed: Mapping[str, dict[str, Any]] = {}
) -> Outcome:
    if importlib.util.find_spec("vllm") is None:
        return skipped("vLLM is not installed")
    shape = models.QWEN2_5_0_5B if context.on_gpu else models.TINY
    dtype = "bfloat16" if context.on_gpu else "float32"
    model = context.shared / f"loop-{shape.hidden}"
    parameters = models.make(shape, model, on=context.device, dtype=getattr(torch, dtype))
    if context.on_gpu:
        torch.cuda.empty_cache()
    outcome = Outcome(numbers={"parameters": parameters, "dtype": dtype})
    tables = _tables(context, model, dtype, engine)
    for name, table in changed.items():
        tables[name] = tables.get(name, {}) | table
    for steps in starts:
        resumed = steps != starts[0]
        tables["run"] |= {"steps": steps, "resume": "auto" if resumed else "never"}
        code = _train(context.folder, tables)
        outcome.require(code == 0, f"{'resumed, ' if resumed else ''}`stare-megatron train` ended with code {code}")
        if code:
            break
    _read(outcome, context, tables, starts)
    return outcome


def _tables(context: Context, model: Path, dtype: str, engine: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration: on a GPU 128 responses of 512 tokens a step, else 32 of 16."""
    prompts = context.folder / "prompts.jsonl"
    rows = [
        {"id": p.id, "source": "random", "prompt": p.text, "answer": p.answer}
        for p in OrderFreeSum().prompts("train", 256, 0)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    response, per_step = (512, 16) if context.on_gpu else (16, 4)
    return {
        "run": {"name": _NAME, "dir": str(context.folder / "runs")},
        "model": {"path": str(model), "dtype": dtype},
        "data": {"train": [str(prompts)], "max_prompt_tokens": _PROMPT_TOKENS},
        "reward": {"name": f"{Path(models.__file__)}:coin"},
        "rollout": {"prompts_per_step": per_step, "group_size": 8, "max_response_tokens": response},
        "algorithm": {"method": "stare"},
        "trainer": {"micro_batch_tokens": 16_384 if context.on_gpu else 1024, "optimizer": {"lr": 1e-5}},
        "inference": {"engines": 1, "placement": "colocated", "vllm": engine},
        "checkpoint": {"every": 2, "keep_last": 1},
        "logging": {"wandb": "disabled"},
    }


def _train(folder: Path, tables: dict[str, Any]) -> int:
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps(tables))
    command = [sys.executable, "-m", "stare_megatron", "train", str(file), "--quiet"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode


def _read(outcome: Outcome, context: Context, tables: dict[str, Any], starts: tuple[int, ...]) -> None:
    """What the metrics of all steps that there are say; fails where one of them is missing or wrong."""
    file = Path(tables["run"]["dir"], _NAME, jsonl.FILE)
    rows = jsonl.read(file) if file.is_file() else []
    numbers = [int(row["step"]) for row in rows]
    outcome.require(numbers == list(range(1, starts[-1] + 1)), f"steps {numbers} in {file.name}, wanted {starts[-1]}")
    if not rows:
        return
    threshold = BOUNDS[tables["model"]["dtype"]]
    for row in rows:
        step = int(row["step"])
        outcome.require(row["sync/probe"] <= threshold, f"step {step}: probe {row['sync/probe']:.2g}")
        outcome.require(
            int(row["sync/weight_version"]) == step, f"step {step}: version {row['sync/weight_version']:.0f}"
        )
    first = {1, *(steps + 1 for steps in starts[:-1])}  # they compile kernels
    later = [row for row in rows if row["step"] not in first] or rows
    kept = [key for key in rows[-1] if key.startswith(_KEPT)]
    outcome.numbers["median of later steps"] = {
        key: statistics.median(row[key] for row in later if key in row)
        for key in kept
        if any(key in row for row in later)
    }
    outcome.numbers["step times"] = [row["time/step"] for row in rows]
    if context.on_gpu:
        samples = tables["rollout"]["prompts_per_step"] * tables["rollout"]["group_size"]
        for phase, passes in (("score", 2), ("update", 6)):
            outcome.numbers[phase] = speed.share_of_peak(
                outcome.numbers["parameters"],
                statistics.median(row["throughput/trained_tokens"] for row in later) + samples * _PROMPT_TOKENS,
                passes,
                statistics.median(row[f"time/{phase}"] for row in later),
            )
