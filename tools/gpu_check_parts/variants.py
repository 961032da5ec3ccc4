"""Part `sft` and those `loop-...` that are not in `loop`: settings of a run, and a loss in it, that take another way on
a GPU than on a CPU, two or three steps each."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from stare_megatron.host import processes
from stare_megatron.metrics import jsonl
from tools.gpu_check_parts import loop, models
from tools.gpu_check_parts.outcome import Context, Outcome, skipped

_PROBE_FP8 = 0.2  # nats, as docs/quantization.md says
_CORE = "EngineCore"  # in the title that vLLM gives to the process of an engine's core


def reference(context: Context) -> Outcome:
    """A reference policy, whose weights are in host memory and on the device in turns; the first step is at it."""
    changed = {"algorithm": {"kl": {"coefficient": 0.1, "estimator": "k2"}}}
    outcome = loop.of_model(context, _dense(context), loop.eager(context), (2,), changed, finds={"kl/reference": 0.0})
    first = outcome.numbers.get("kl/reference", [math.nan])[0]
    outcome.require(
        first < 1e-4, f"kl/reference of the first step is {first:.2g}: the policy is its own reference there"
    )
    return outcome


def stream(context: Context) -> Outcome:
    """Groups that are not finished with their batch stay in an engine that sleeps, and go on under the next weights."""
    changed = {
        "sampling": {"mode": "stream", "max_staleness": 1, "over_sampling": 0.5},
        "algorithm": {"correction": {"mode": "truncate"}},
        "sync": {"probe_every": 1},
    }
    return loop.of_model(context, _dense(context), loop.eager(context), (3,), changed, finds={"mismatch/ess": 0.5})


def recovery(context: Context) -> Outcome:
    """The process of the engine's core is killed while it samples for the second step: another takes its place."""
    if not context.on_gpu:
        return skipped("an engine's core is in a process of its own on a GPU")
    run, seen = context.folder / "runs" / loop.NAME, {"killed": 0}

    def kill(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and not seen["killed"]:
            time.sleep(0.5)
            if (run / jsonl.FILE).is_file() and jsonl.read(run / jsonl.FILE):
                seen["killed"] = _kill_cores(process.pid)

    engine = loop.eager(context)
    outcome = loop.of_model(context, _dense(context), engine, (3,), finds={"fleet/healthy": 1.0}, meanwhile=kill)
    restarts = sum(float(row["fleet/restarts"]) for row in loop.recorded(outcome, run, 3))
    outcome.numbers |= seen | {"fleet/restarts": restarts}
    outcome.require(
        seen["killed"] == 1 == restarts, f"{seen['killed']} cores were killed, {restarts:g} engines restarted"
    )
    return outcome


def _kill_cores(pid: int) -> int:
    """Kill the cores among the processes under `pid`; how many there were."""
    killed = 0
    for process in (process for tree in processes.under([pid]) for process in tree[1:]):
        try:
            if any(_CORE in word for word in process.cmdline()):
                process.kill()
                killed += 1
        except psutil.Error:  # it has ended by itself
            continue
    return killed


def drafts(context: Context) -> Outcome:
    """N-gram drafts: every token is still drawn as the model says, which `mismatch/*` and the probe tell."""
    changed = {"inference": {"speculative": {"method": "ngram", "ngram_min": 1}}}
    finds = {"engine/draft_acceptance": 0.0}
    return _of_dense(context, changed, finds)


def quantized(context: Context) -> Outcome:
    """Engines in float8, into which pushes go in bfloat16."""
    return _in_float8(context, {"inference": {"quantization": "fp8_per_channel"}})


def trained_in_float8(context: Context) -> Outcome:
    """Ranks whose layers multiply in float8 with scales of blocks, beside engines in bfloat16."""
    if not context.on_gpu or importlib.util.find_spec("transformer_engine") is None:
        return skipped("needs Transformer Engine and a GPU")
    return _in_float8(context, {"trainer": {"fp8": "blockwise"}})


def _in_float8(context: Context, changed: dict[str, dict[str, Any]]) -> Outcome:
    needed = {
        "algorithm": {"correction": {"mode": "truncate"}},
        "sync": {"probe_threshold": _PROBE_FP8, "probe_every": 1},
        "trainer": {"scoring": "trainer"} | changed.get("trainer", {}),
    }
    return _of_dense(context, changed | needed, {"mismatch/ess": 0.5}, dtype="bfloat16")


def replay(context: Context) -> Outcome:
    """A mixture of experts whose ranks take the experts that the engine took, and whose weights checksums cover."""
    if not context.on_gpu:
        return skipped("vLLM returns experts from its second model runner alone, which wants a GPU")
    changed = {"inference": {"routing_replay": True}}
    covered = {"sync/compared": 1.0}  # the kernel's layout of experts is one that can be read back
    return loop.of_model(context, models.EXPERTS_0_5B, loop.eager(context), (2,), changed, finds=covered)


def supervised(context: Context) -> Outcome:
    """`stare-megatron sft`: two steps, two more after a resume; the loss of the rows that it learns falls."""
    shape = _dense(context)
    dtype = "bfloat16" if context.on_gpu else "float32"
    model = context.shared / models.name(shape, dtype)
    models.make(shape, model, on=context.device, dtype=getattr(torch, dtype))
    if context.on_gpu:
        torch.cuda.empty_cache()
    words = [f"w{number}" for number in range(16)]
    rows = [{"prompt": words[k % 16], "completion": " ".join(words[k % 5 : k % 5 + 8])} for k in range(64)]
    file = context.folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables: dict[str, Any] = {
        "run": {"name": loop.NAME, "dir": str(context.folder / "runs")},
        "model": {"path": str(model), "dtype": dtype},
        "data": {"train": [str(file)]},
        "sft": {"epochs": 8, "batch_sequences": 32, "max_tokens": 64},
        "trainer": {"micro_batch_tokens": 1024, "optimizer": {"lr": 1e-3}},
        "checkpoint": {"every": 2, "keep_last": 1},
        "logging": {"wandb": "disabled"},
    }
    outcome = Outcome()
    for steps, resume in ((2, "never"), (4, "auto")):
        tables["run"] |= {"steps": steps, "resume": resume}
        code = loop.command("sft", context.folder, tables)
        outcome.require(code == 0, f"`stare-megatron sft` up to step {steps} ended with code {code}")
        if code:
            return outcome
    losses = [float(row["update/loss"]) for row in loop.recorded(outcome, Path(tables["run"]["dir"], loop.NAME), 4)]
    outcome.numbers["loss"] = losses
    outcome.require(len(losses) == 4 and losses[-1] < losses[0], f"the loss does not fall: {losses}")
    return outcome


def _dense(context: Context) -> models.Shape:
    return models.SHALLOW if context.on_gpu else models.TINY


def _of_dense(context: Context, changed: dict[str, Any], finds: dict[str, float], dtype: str = "") -> Outcome:
    return loop.of_model(context, _dense(context), loop.eager(context), (2,), changed, dtype=dtype, finds=finds)
