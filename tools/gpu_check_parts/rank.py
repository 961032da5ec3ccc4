"""Parts `rank`, `rank-te`, `rank-adam`: a trainer rank loads, scores, updates, saves, restores, exports; against
float32."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.gpu_check_parts import models
from tools.gpu_check_parts.libraries import NO_GPU
from tools.gpu_check_parts.outcome import Context, Outcome, skipped
from tools.gpu_check_parts.runner import last_lines


@dataclass(frozen=True)
class Tolerance:
    """Largest difference from float32: of the mean entropy (nats), the gradient norm (relative), and of log-probs after
    the updates (nats, mean and largest)."""

    entropy: float
    grad_norm: float
    mean: float
    largest: float


# bfloat16 has 8 bits, float16 11. Some four times what a CPU shows of either, more for entropies and gradient norms, in
# which errors cancel.
TOLERANCES = {
    "bfloat16": Tolerance(entropy=0.005, grad_norm=0.03, mean=0.05, largest=0.15),
    "float16": Tolerance(entropy=0.001, grad_norm=0.005, mean=0.005, largest=0.02),
}


def local(context: Context) -> Outcome:
    return _compare(context, "torch")


def transformer_engine(context: Context) -> Outcome:
    return _lack(context) or _compare(context, "transformer_engine")


# Both moments, which is what saves memory; they are rounded to 8 bits, as the weights' steps are in bfloat16.
_FEWER_BYTES = {"precision_aware": True, "exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}


def precision_aware(context: Context) -> Outcome:
    return _lack(context) or _compare(context, "transformer_engine", ("bfloat16",), _FEWER_BYTES)


def _lack(context: Context) -> Outcome | None:
    if not context.on_gpu:
        return skipped(NO_GPU)
    if importlib.util.find_spec("transformer_engine") is None:
        return skipped("Transformer Engine is not installed")
    return None


def _compare(
    context: Context, layers: str, dtypes: tuple[str, ...] = tuple(TOLERANCES), optimizer: Mapping[str, Any] = {}
) -> Outcome:
    """`optimizer`: more keys of it, for the ranks that are compared with float32."""
    model = context.shared / "small"
    models.make(models.SMALL, model, on="cpu", dtype=torch.float32)
    cases = [("cpu", "float32", "torch", {}), *((context.device, dtype, layers, optimizer) for dtype in dtypes)]
    outcome = Outcome()
    with ThreadPoolExecutor(len(cases) if context.on_gpu else 1) as pool:
        runs = [pool.submit(_rank, context, model, *case) for case in cases]
        exact, *found = (run.result() for run in runs)
    if isinstance(exact, str):
        outcome.fail(f"float32 on a CPU: {exact}")
        return outcome
    for dtype, seen in zip(dtypes, found, strict=True):
        tolerance = TOLERANCES[dtype]
        if isinstance(seen, str):
            outcome.fail(f"{dtype}: {seen}")
            continue
        outcome.require(seen["layers"] == layers, f"{dtype}: layers of {seen['layers']} were chosen, not of {layers}")
        for step, (got, want) in enumerate(zip(seen["steps"], exact["steps"], strict=True), 1):
            outcome.near(f"{dtype} entropy, step {step}", got["entropy"], want["entropy"], tolerance.entropy)
            where = f"{dtype} gradient norm, step {step}"
            outcome.near(where, got["grad_norm"], want["grad_norm"], tolerance.grad_norm, relative=True)
        apart = [abs(a - b) for a, b in zip(seen["probe"], exact["probe"], strict=True)]
        outcome.near(f"{dtype} log-probs after the updates, mean", sum(apart) / len(apart), 0.0, tolerance.mean)
        outcome.near(f"{dtype} log-probs after the updates, largest", max(apart), 0.0, tolerance.largest)
        for what in ("restored", "exported"):
            outcome.require(seen[what] == "", f"{dtype}: {what}: {seen[what]}")
        outcome.numbers[f"{dtype} peak, MiB"] = seen["peak"] / 2**20
        outcome.numbers[f"{dtype} seconds"] = seen["seconds"]
    return outcome


def _rank(
    context: Context, model: Path, place: str, dtype: str, layers: str, optimizer: Mapping[str, Any]
) -> dict[str, Any] | str:
    """What `one_rank` found, or its error."""
    folder = context.folder / f"{place}-{dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tools.gpu_check_parts.one_rank", str(model), dtype, layers, str(folder)]
    command.append(json.dumps(dict(optimizer)))
    log = folder / "log.txt"
    with log.open("wb") as out:
        done = subprocess.run(
            command, env=os.environ | {"STARE_DEVICE": place}, stdout=out, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        return "\n".join([f"ended with code {done.returncode}", *(f"| {line}" for line in last_lines(log))])
    return json.loads((folder / "found.json").read_text())
