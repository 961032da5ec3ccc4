"""Part `offload`: what leaves the GPU with `trainer.offload`, how fast, and that it learns the same bit for bit."""

from __future__ import annotations

import gc
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stare_megatron.config import Config
from stare_megatron.config.trainer import StateClass
from stare_megatron.host import copies
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import Control
from tools.bench_trainer import load, make_rank
from tools.gpu_check_parts import models
from tools.gpu_check_parts.one_rank import PROBE, as_torchrun, configuration
from tools.gpu_check_parts.outcome import Context, Outcome

ALL: list[StateClass] = ["gradients", "optimizer", "parameters"]
UPDATES, CYCLES = 3, 20
_GIB = 2**30


@dataclass
class Seen:
    """Of one run of the updates. `learned`: what they measured, and the weights' log-probs of the probe, as text.
    Bytes and seconds: of the state by metric, after each cycle."""

    learned: list[str] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    reserved: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    offload_s: list[float] = field(default_factory=list)
    onload_s: list[float] = field(default_factory=list)


def check(context: Context) -> Outcome:
    """Two runs without offload, one with it and one with steps in bundles: the first two say whether this GPU repeats
    itself at all."""
    shape = models.QWEN2_5_1_5B if context.on_gpu else models.SMALL
    model = context.shared / ("qwen2.5-1.5b" if context.on_gpu else "small-bf16")
    models.make(shape, model, on=context.device, dtype=torch.bfloat16)
    copies.release_cache()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    outcome = Outcome()
    bundle = 512 if context.on_gpu else 8  # MiB
    tables: list[dict[str, Any]] = [{}, {}, {"offload": ALL}, {"offload": ALL, "offload_step_mb": bundle}]
    plain, again, moved, bundled = (_run(model, table, context.on_gpu) for table in tables)
    outcome.numbers["repeats itself"] = plain.learned == again.learned
    if plain.learned == again.learned:
        outcome.require(moved.learned == plain.learned, "updates differ with offload")
        outcome.require(bundled.learned == plain.learned, "updates differ with optimizer steps in bundles")
    else:  # an operator sums in another order each time: the state's own bits are what is left to compare
        outcome.numbers["updates"] = {"without": plain.learned, "again": again.learned, "with": moved.learned}
        outcome.numbers["updates"]["in bundles"] = bundled.learned
    moved_bytes = sum(moved.memory[f"memory/trainer_{name}"] for name in ("parameters", "optimizer")) * 2**20
    outcome.numbers |= {
        "arena, GiB": moved.memory["memory/trainer_arena"] / 1024,
        "moved, GiB": moved_bytes / _GIB,
        "left while engines sample, MiB": moved.memory["memory/trainer_resident"],
        "peak without, GiB": plain.peak / _GIB,
        "peak with, GiB": moved.peak / _GIB,
        "peak in bundles, GiB": bundled.peak / _GIB,
        "to host, GB/s": moved_bytes / 1e9 / float(np.median(moved.offload_s)),
        "to device, GB/s": moved_bytes / 1e9 / float(np.median(moved.onload_s)),
        "allocated after each cycle, MiB": [size / 2**20 for size in moved.allocated],
        "reserved after each cycle, MiB": [size / 2**20 for size in moved.reserved],
    }
    outcome.require(len(set(moved.allocated)) == 1, "what is left on the GPU changes from cycle to cycle")
    return outcome


def _run(model: Path, table: dict[str, Any], on_gpu: bool) -> Seen:
    as_torchrun()
    config = configuration(model, "bfloat16", **table)
    seen, trainer = Seen(), make_rank(config)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seen.learned = [_update(trainer, config, number) for number in range(UPDATES)]
    seen.peak = trainer.peak_memory_bytes()
    seen.memory = {part.name: part.total for part in trainer.memory()}
    if table:
        before = _digest(trainer)
        for _ in range(CYCLES):
            trainer.memory()
            with trainer._offload.present("parameters", "optimizer"):
                pass
            trainer.to_host()
            moves = {part.name: part.total for part in trainer.memory()}
            seen.onload_s.append(moves["time/onload"])
            seen.offload_s.append(moves["time/offload"])
            seen.allocated.append(copies.allocated_bytes())
            seen.reserved.append(torch.cuda.memory_reserved() if on_gpu else 0)
        seen.learned[-1] += "" if _digest(trainer) == before else " and changed in the cycles"
    trainer.close()
    del trainer
    gc.collect()
    copies.release_cache()
    return seen


def _update(trainer: TrainerRank, config: Config, number: int) -> str:
    trainer.to_device()
    load(trainer, config, number)
    entropy = trainer.score().entropy
    (done,) = trainer.update(Control(True, 1.1, 0.9, entropy, entropy + 1.0)).updates
    probe = hashlib.sha256(trainer.score_tokens(PROBE).tobytes()).hexdigest()
    trainer.to_host()
    return f"entropy {entropy!r} norm {done['update/grad_norm']!r} probe {probe}"


def _digest(trainer: TrainerRank) -> list[str]:
    """Of the bytes of everything that is kept."""
    offload = trainer._offload
    with offload.present("parameters", "optimizer"):
        kept = (*offload.contents("parameters"), *offload.contents("optimizer"))
        return [hashlib.sha256(data).hexdigest() for data in kept]
