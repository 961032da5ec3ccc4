"""Synthetic evaluations with known parameters, and run folders with such, of no training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tomli_w

from stare_megatron.scaling.sigmoid import Points, predict

R0, A, MID, B = 0.1, 0.7, 1e12, 1.5
SAMPLES = 1024


def draw(rng: np.random.Generator, seeds: int = 4, evaluations: int = 12, top: float = 8.0) -> Points:
    """Evaluations of `seeds` runs up to `top` times C_mid: each run's parameters differ a little, each evaluation is a
    binomial draw."""
    parts = []
    for seed in range(seeds):
        theta = np.array(
            [R0, A + rng.normal(0, 0.02), np.log(MID) + rng.normal(0, 0.15), np.log(B) + rng.normal(0, 0.1)]
        )
        x = np.concatenate([[0.0], np.linspace(top / evaluations, top, evaluations) * MID * rng.uniform(0.95, 1.05)])
        y = rng.binomial(SAMPLES, predict(theta, x)) / SAMPLES
        parts.append((x, y, np.sqrt(y * (1 - y) / SAMPLES), np.full(len(x), seed)))
    return Points(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def write_run(
    folder: Path,
    name: str,
    *,
    seed: int,
    parameters: int,
    accuracy: list[float],
    method: str = "grpo",
    world: int = 2,
    tflops: float = 1.0,
    **run_record: object,
) -> Path:
    """A finished run evaluated at step 0 and after every tenth step, `accuracy` there. Each step takes 2 s: 1 s of
    sampling and half a second each of scoring and update, all at `tflops` a device."""
    steps = 10 * (len(accuracy) - 1)
    run = folder / name
    run.mkdir(parents=True)
    row = {
        "policy/entropy": 0.2,
        "policy/target_entropy": 0.2,
        "throughput/trained_tokens": 100,
        "time/step": 2.0,
        "engine/sampling_seconds": 1.0,
        "time/score": 0.5,
        "time/update": 0.5,
        **{f"rates/{phase}_tflops": tflops for phase in ("rollout", "score", "update")},
    }
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s} | row) + "\n" for s in range(1, steps + 1)))
    lines = []
    for i, value in enumerate(accuracy):
        ends = {"eval/test/avg@8/ci_low": value - 0.0196, "eval/test/avg@8/ci_high": value + 0.0196}
        lines.append(json.dumps({"step": 10 * i, "eval/test/avg@8": value, "eval/avg": value} | ends) + "\n")
    (run / "eval.jsonl").write_text("".join(lines))
    settings = {
        "run": {"name": name, "seed": seed, "steps": steps},
        "model": {"path": f"somewhere/{parameters}-{seed}/model"},
        "algorithm": {"method": method},
        "trainer": {"world_size": world},
        "inference": {"engines": 1, "tensor_parallel": 1, "placement": "colocated"},
        "reward": {"name": "order_free_sum"},
        "rollout": {"group_size": 8},
    }
    (run / "config.toml").write_text(tomli_w.dumps(settings))
    start = {
        "time": "2026-01-02T03:04:05+00:00",
        "command": [],
        "seed": seed,
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "commit": "0123456789",
        "dirty": False,
        "hardware": "2 CPUs (x86_64), 24 GiB memory, no GPU",
        "parameters": parameters,
    }
    (run / "run.json").write_text(json.dumps({"starts": [start | run_record]}))
    return run
