"""Run folders with made-up numbers for the tests of `compare`: the files are as a run writes them, the values are not
those of any training."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path

import tomli_w

RECORD = {
    "time": "2026-01-02T03:04:05+00:00",
    "command": ["stare-megatron", "train", "run.toml"],
    "seed": 0,
    "python": "3.11.7",
    "packages": {"torch": "2.13.0+cpu", "megatron-core": "0.16.1", "ray": "2.60.0"},
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "hardware": "2 CPUs (x86_64), 24 GiB memory, no GPU",
}


def settings(name: str, seed: int, steps: int, method: str, **stare: float) -> dict:
    algorithm: dict = {"method": method, "clip_low": 0.2}
    if method == "stare":
        algorithm["stare"] = {"target_entropy": 0.2, "weight_pos": 8.0, **stare}
    return {
        "run": {"name": name, "dir": "runs", "seed": seed, "steps": steps},
        "model": {"path": ".cache/demo/model"},
        "data": {"train": [".cache/demo/train.jsonl"]},
        "algorithm": algorithm,
        "logging": {"wandb": "offline"},
    }


def rows(
    seed: int, steps: int, method: str, target: float = 0.2, evaluate: bool = False, flavour: float = 0
) -> list[dict]:
    """Entropy that falls to the target and stays (stare) or falls to nothing."""
    rng = random.Random(f"{method}-{seed}-{target}-{flavour}")
    entropy, before, tokens, found = 0.55, math.nan, 0, []
    for step in range(1, steps + 1):
        floor = target * (1 + 0.12 * math.sin(step / 7)) if method == "stare" else 0.06
        entropy += 0.045 * (floor - entropy) + rng.gauss(0, 0.006)
        entropy = max(entropy, 0.01)
        reward = min(1.0, 0.16 + (0.5 if method == "stare" else 0.7) * (1 - math.exp(-step / 60)) + rng.gauss(0, 0.02))
        trained = rng.randint(3900, 4200)
        tokens += trained
        seconds = {"rollout": rng.uniform(0.9, 1.4), "score": 0.2, "update": 0.27, "push": 0.15, "save": 0.0}
        total = sum(seconds.values()) + 0.02
        shares = [rng.uniform(0.1, 1) for _ in range(4)]
        quadrants = ("pos_likely", "pos_unlikely", "neg_likely", "neg_unlikely")
        row = {
            "step": step,
            "reward/mean": reward,
            "reward/correct": reward,
            "groups/sampled": 40,
            "groups/all_correct": int(30 * reward**3),
            "groups/none_correct": int(12 * (1 - reward)),
            "groups/dropped": int(30 * reward**3) + int(12 * (1 - reward)),
            "response/length_mean": 16 + rng.gauss(0, 0.05),
            "response/truncated": 0.0,
            "policy/entropy": entropy,
            "policy/target_entropy": target,
            "stare/gate": float(method == "stare" and entropy < target),
            "stare/weight_pos": 8.0 if method == "stare" and entropy < target else 1.0,
            "update/grad_norm": 0.3 * math.exp(rng.gauss(0, 0.2)),
            "update/clip_fraction": 0.0,
            "update/lr": min(1.0, step / 10) * 1e-3,
            "mismatch/mean": 3.4e-7 * math.exp(rng.gauss(0, 0.05)),
            "mismatch/max": 1e-5 * math.exp(rng.gauss(0, 0.3)),
            "dynamics/predicted_change_before": "NaN" if math.isnan(before) else (entropy - before) * rng.uniform(2, 9),
            "dynamics/measured_change": "NaN" if math.isnan(before) else entropy - before,
            "dynamics/overlap": rng.uniform(0.15, 0.25),
            **{f"dynamics/tokens_{q}": s / sum(shares) for q, s in zip(quadrants, shares, strict=True)},
            "throughput/tokens_per_second": 5400 / total,
            "throughput/trained_tokens": trained,
            "throughput/trained_tokens_total": tokens,
            **{f"time/{name}": value for name, value in seconds.items()},
            "time/step": total,
            "memory/trainer_peak": 690.0 + seed,
            "memory/engine_peak": 1900.5,
        }
        if evaluate and step % 10 == 0:
            row |= {"eval/held_out/avg@8": reward * 0.97, "eval/held_out/pass@8": min(1.0, reward + 0.2)}
        found.append(row)
        before = entropy
    return found


def write_run(
    folder: Path,
    name: str,
    seed: int = 0,
    steps: int = 30,
    method: str = "stare",
    done: int | None = None,
    packed: bool = False,
    tail: str = "",
    evaluate: bool = False,
    **stare: float,
) -> Path:
    """A run's folder below `folder`. `done`: steps logged, all if None; `tail`: text after the last whole line."""
    run = folder / name
    run.mkdir(parents=True)
    target = stare.get("target_entropy", 0.2)
    made = rows(seed, steps if done is None else done, method, target, evaluate, sum(stare.values()))
    text = "".join(json.dumps(row) + "\n" for row in made) + tail
    if packed:
        (run / "metrics.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        (run / "metrics.jsonl").write_text(text)
    (run / "config.toml").write_text(tomli_w.dumps(settings(name, seed, steps, method, **stare)))
    (run / "run.json").write_text(json.dumps({"starts": [RECORD | {"seed": seed}]}))
    return run


def write_sample_records(run: Path, step: int, pieces: list[str]) -> Path:
    """A trajectory with a tool's answer, trained on, and one that failed; `pieces`: of the first's first turn."""
    rng = random.Random(step)
    n = len(pieces)

    def span(kind: str, texts: list[str], first: int, **columns: list) -> dict:
        return {"kind": kind, "token_ids": [first + i for i in range(len(texts))], "pieces": texts, **columns}

    def action(texts: list[str], first: int, trained: bool, versions: list[list[int]] | None = None) -> dict:
        engine = [round(-rng.expovariate(0.8), 5) for _ in texts]
        columns: dict[str, list] = {"rollout_logprobs": [*engine[:-1], None]}
        columns["policy_versions"] = versions or [[0, len(texts)]]
        if trained:
            columns |= {
                "logprobs": [round(x - 0.01, 5) for x in engine],
                "raw_logprobs": [round(x + rng.gauss(0, 0.01), 5) for x in engine],
                "entropies": [round(rng.uniform(0, 2), 5) for _ in texts],
                "weights": [1.0 if x > -2 else 1.5 for x in engine],
                "selection": [(i % 3) - 1 for i in range(len(texts))],
            }
        return span("action", texts, first, **columns)

    calls = [{"tool": "python", "code": "print(6 * 7)", "outcome": "ok", "seconds": 0.004}]
    head = {"step": step, "prompt_id": "p <i>", "source": "unit", "answer": "42", "policy_version": 0, "seed": 5}
    good = {
        "sample": 0,
        "reward": 1.0,
        "correct": True,
        "status": "completed",
        "note": "",
        "advantage": 0.5,
        "turns": [{"void": False, "calls": calls}, {"void": False, "calls": []}],
        "spans": [
            span("prompt", ["What is", " 6", " times", " 7?", "\n"], 1),
            action(pieces, 100, True),
            span("observation", ["<tool_response>", "\n", "42", "\n", "</tool_response>"], 100 + n),
            action(["The", " answer", " is", " 4", "2", ".", "<|im_end|>"], 500, True, [[0, 2], [1, 5]]),
        ],
    }
    failed = {
        "sample": 1,
        "reward": 0.0,
        "correct": False,
        "status": "failed",
        "note": "no answer",
        "advantage": None,
        "turns": [],
        "spans": [span("prompt", ["What is"], 1), action(["I", "", "é"], 700, False)],
    }
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    file = folder / f"step_{step:06d}.jsonl"
    file.write_text("".join(json.dumps(head | line, ensure_ascii=False) + "\n" for line in (good, failed)))
    return file
