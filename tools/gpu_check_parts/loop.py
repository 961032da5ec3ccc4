"""Parts `loop`, `loop-sharded` and `loop-graphs`: the real command on a random model; what its metrics say of time, MFU
and memory."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
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
NAME = "check"
_KEPT = ("time/", "memory/", "throughput/", "rates/push", "sync/probe", "mismatch/")  # metrics that are told of


def check(context: Context) -> Outcome:
    """Three steps, saved after the last; resumed for one more."""
    return of_model(context, _dense(context), eager(context), (3, 4))


def graphs(context: Context) -> Outcome:
    """Two steps with what vLLM does by default on a GPU: it compiles the model and records CUDA graphs."""
    if not context.on_gpu:
        return skipped("a CPU engine has neither")
    return of_model(context, _dense(context), {}, (2,))


def sharded(context: Context) -> Outcome:
    """Two steps with sharded pushes, from ranks whose state is away while the engine samples."""
    offload = {"offload": ["gradients", "optimizer", "parameters"]}
    changed = {"sync": {"method": "sharded"}, "trainer": offload}
    return of_model(context, _dense(context), eager(context), (2,), changed)


def eager(context: Context) -> dict[str, Any]:
    """Options of an engine that compiles nothing, where it would."""
    return {"enforce_eager": True} if context.on_gpu else {}


def _beside(context: Context) -> dict[str, Any]:
    """Options of an engine that others run beside: neither it nor vLLM may take what is free now for its own."""
    return (
        {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 4 << 30} if context.beside and context.on_gpu else {}
    )


def _dense(context: Context) -> models.Shape:
    return models.QWEN2_5_0_5B if context.on_gpu else models.TINY


def of_model(
    context: Context,
    shape: models.Shape,
    engine: dict[str, Any],
    starts: tuple[int, ...],
    changed: Mapping[str, dict[str, Any]] = {},
    *,
    dtype: str = "",
    finds: Mapping[str, float] = {},
    meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Outcome:
    """`stare-megatron train` once for each of `starts`, up to so many steps.

    `engine`: options of vLLM; `changed`: keys of the run's tables; `dtype`: another than bfloat16 on a GPU, float32 on
    a CPU; `finds`: metrics that every step must have, and the least of each; `meanwhile`: is called with the command's
    process while it runs.
    """
    if importlib.util.find_spec("vllm") is None:
        return skipped("vLLM is not installed")
    dtype = dtype or ("bfloat16" if context.on_gpu else "float32")
    model = context.shared / models.name(shape, dtype)
    parameters = models.make(shape, model, on=context.device, dtype=getattr(torch, dtype))
    if context.on_gpu:
        torch.cuda.empty_cache()
    outcome = Outcome(numbers={"parameters": parameters, "dtype": dtype})
    tables = _tables(context, model, dtype, engine)
    for name, table in changed.items():
        tables[name] = tables.get(name, {}) | table
    tables["checkpoint"] = {"every": 0, "keep_last": 1, "export_final": len(starts) > 1}
    for steps in starts:
        resumed = steps != starts[0]
        tables["run"] |= {"steps": steps, "resume": "auto" if resumed else "never"}
        code = command("train", context.folder, tables, meanwhile)
        outcome.require(code == 0, f"{'resumed, ' if resumed else ''}`stare-megatron train` ended with code {code}")
        if code:
            break
    _read(outcome, context, tables, starts, finds)
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
    batch = (4096 if context.beside else 16_384) if context.on_gpu else 1024
    return {
        "run": {"name": NAME, "dir": str(context.folder / "runs")},
        "model": {"path": str(model), "dtype": dtype},
        "data": {"train": [str(prompts)], "max_prompt_tokens": _PROMPT_TOKENS},
        "reward": {"name": f"{Path(models.__file__)}:coin"},
        "rollout": {"prompts_per_step": per_step, "group_size": 8, "max_response_tokens": response},
        "algorithm": {"method": "stare"},
        "trainer": {"micro_batch_tokens": batch, "optimizer": {"lr": 1e-5}},
        "inference": {"engines": 1, "placement": "colocated", "vllm": _beside(context) | engine},
        "logging": {"wandb": "disabled"},
    }


def command(
    name: str, folder: Path, tables: dict[str, Any], meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None
) -> int:
    """The exit code of a command of the package on a file of these tables; `meanwhile` is called while it runs."""
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps(tables))
    words = [sys.executable, "-m", "stare_megatron", name, str(file), "--quiet"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as process:
        if meanwhile is not None:
            meanwhile(process)
        return process.wait()


def recorded(outcome: Outcome, run: Path, last: int) -> list[dict[str, Any]]:
    """A run's metrics; fails where they are not those of all steps."""
    file = run / jsonl.FILE
    rows = jsonl.read(file) if file.is_file() else []
    numbers = [int(row["step"]) for row in rows]
    outcome.require(numbers == list(range(1, last + 1)), f"steps {numbers} in {file.name}, wanted {last}")
    return rows


def _read(
    outcome: Outcome,
    context: Context,
    tables: dict[str, Any],
    starts: tuple[int, ...],
    finds: Mapping[str, float],
) -> None:
    """What the metrics of all steps that there are say; fails where one of them is missing or wrong."""
    rows = recorded(outcome, Path(tables["run"]["dir"], NAME), starts[-1])
    if not rows:
        return
    for name, least in finds.items():
        found = [float(row.get(name, "nan")) for row in rows]
        outcome.numbers[name] = found
        outcome.require(all(value >= least for value in found), f"{name} of the steps is {found}, wanted {least:g}")
    threshold = tables.get("sync", {}).get("probe_threshold", BOUNDS[tables["model"]["dtype"]])
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
