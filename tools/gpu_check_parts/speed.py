"""Part `rank-speed`: what a rank in the shape of a real model does in a second (by tools/bench_trainer.py)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from stare_megatron.config import parse
from tools import bench_trainer
from tools.gpu_check_parts import models
from tools.gpu_check_parts.libraries import NO_GPU
from tools.gpu_check_parts.one_rank import as_torchrun
from tools.gpu_check_parts.outcome import Context, Outcome, skipped

# Dense bfloat16, TFLOP/s by the maker's table, by what the device's name begins with.
PEAKS = {"NVIDIA H100 PCIe": 756, "NVIDIA H100": 989, "NVIDIA H200": 989, "NVIDIA A100": 312, "NVIDIA B200": 2250}


def peak_flops() -> float | None:
    """Of this GPU, FLOP/s; None for one that is not in the table."""
    name = torch.cuda.get_device_name(0)
    return next((1e12 * peak for known, peak in PEAKS.items() if name.startswith(known)), None)


def share_of_peak(parameters: int, tokens: float, passes: int, seconds: float) -> dict[str, float]:
    """TFLOP/s and, where the peak is known, MFU in percent: `passes` x parameters x tokens, 2 forward, 6 with backward.
    Attention's own products are not counted."""
    rate, peak = passes * parameters * tokens / seconds, peak_flops()
    return {"TFLOP/s": rate / 1e12} | ({"MFU, %": 100 * rate / peak} if peak else {})


def check(context: Context) -> Outcome:
    """Mixed lengths, full recomputation, so that it fits beside nothing else on 80 GB."""
    if not context.on_gpu:
        return skipped(NO_GPU)
    shape = models.QWEN2_5_1_5B
    model = context.shared / "qwen2.5-1.5b"
    parameters = models.make(shape, model, on="cuda", dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    outcome = Outcome(numbers={"model": dataclasses.asdict(shape), "parameters": parameters})
    as_torchrun()
    config = parse(
        {
            "run": {"name": "gpu-check", "steps": 4},
            "model": {"path": str(model), "dtype": "bfloat16"},
            "data": {"train": ["none.jsonl"], "max_prompt_tokens": 512},
            "reward": {"name": "math"},
            "rollout": {"prompts_per_step": 8, "group_size": 8, "max_response_tokens": 2048},
            "trainer": {"micro_batch_tokens": 16_384, "recompute": "full"},
        },
        "gpu_check",
    )
    tokens, score_s, update_s, peak = bench_trainer.measure(config)
    for name, seconds, passes in (("scoring", score_s, 2), ("update", update_s, 6)):
        median = float(np.median(seconds))
        outcome.numbers[name] = {"tokens/s": tokens / median} | share_of_peak(parameters, tokens, passes, median)
    outcome.numbers["peak, GiB"] = peak / 2**30
    return outcome
