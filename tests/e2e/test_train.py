"""The whole loop with the real parts: Ray, a vLLM engine, two Megatron-Core ranks, on a model that can learn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from stare_megatron.metrics import jsonl
from stare_megatron.tasks.make import make
from stare_megatron.tasks.smollm2 import make_smollm2
from stare_megatron.tasks.tiny_model import default_settings

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "stare_megatron", "train", str(ROOT / "examples/demo_cpu/run.toml"), "--quiet"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its prompts, made as the demo makes them but from another seed."""
    folder = tmp_path_factory.mktemp("e2e") / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), folder, 512, 32)
    return folder


def arguments(material: Path, runs: Path, **overrides: object) -> list[str]:
    keys: dict[str, object] = {
        "run.dir": runs,
        "run.name": "e2e",
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "logging.wandb": "disabled",
        "checkpoint.every": 0,
    } | overrides
    return [*COMMAND, *(f"{key}={value}" for key, value in keys.items())]


def test_stare_trains(material: Path, tmp_path: Path) -> None:
    """Reward rises, engine and trainer agree at every step, the engine's weights change, all files are there."""
    steps = 24
    done = subprocess.run(
        arguments(material, tmp_path, **{"run.steps": steps}), cwd=ROOT, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "e2e"
    rows = jsonl.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))

    first = sum(row["reward/mean"] for row in rows[:4]) / 4
    last = sum(row["reward/mean"] for row in rows[-4:]) / 4
    # 4 steps are some 1,280 samples: the standard error of such a mean is below 0.014.
    assert last - first >= 0.1, f"reward {first:.3f} -> {last:.3f}"

    assert all(row["mismatch/mean"] < 1e-3 for row in rows)
    assert all(row["sync/probe"] < 1e-3 for row in rows)
    # Had a push not reached the engine, its samples would come from old weights and the mismatch would grow.
    assert [row["sync/weight_version"] for row in rows] == list(range(1, steps + 1))
    assert all(row["sync/staleness"] == 0 for row in rows)
    assert any(row["stare/gate"] for row in rows) or min(row["policy/entropy"] for row in rows) >= 0.2

    before, after = (load_file(folder / "model.safetensors") for folder in (material / "model", run / "hf"))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    for name in ("config.toml", "run.json", "curves.png", "samples", "tensorboard", "checkpoints/latest", "logs"):
        assert (run / name).exists(), name


def test_interrupt_saves_and_resume_goes_on(material: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the step, saves, and leaves no process; `run.resume=auto` goes on from there at another layout, and
    without a scoring pass."""
    run = tmp_path / "e2e"
    small = {"run.steps": 40, "rollout.prompts_per_step": 8, "rollout.prompts_per_generation": 8}
    process = subprocess.Popen(
        arguments(material, tmp_path, **small), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 240
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()[-3000:]  # type: ignore[union-attr]
        time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output[-3000:]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [p.name() for p in alive]

    saved = int((run / "checkpoints/latest").read_text().strip().removeprefix("step_"))
    logged = metrics.read_text()
    assert jsonl.read(metrics)[-1]["step"] == saved

    layout = {
        "run.steps": saved + 2,
        "run.resume": "auto",
        "trainer.tensor_parallel": 1,
        "trainer.pipeline_parallel": 2,
        "trainer.scoring": "rollout",
    }
    again = subprocess.run(
        arguments(material, tmp_path, **small | layout), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert metrics.read_text().startswith(logged)
    resumed = jsonl.read(metrics)
    assert [row["step"] for row in resumed] == list(range(1, saved + 3))
    # A model that was not restored, or pushed wrongly, would disagree with what the engine sampled.
    assert all(row["mismatch/mean"] < 1e-3 for row in resumed)
    # Measured in the update pass without a scoring pass, and not made up: the gate read the engine's surprisal instead.
    for row in resumed[-2:]:
        assert row["policy/entropy_estimate"] == pytest.approx(row["policy/surprisal"], abs=1e-3)
        assert 0 < abs(row["policy/entropy_estimate_error"]) < 0.2
        assert row["stare/gate"] == (row["policy/entropy_estimate"] < row["policy/target_entropy"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_pretrained_model_trains(tmp_path: Path) -> None:
    """Two steps of the example on SmolLM2-135M, heads padded for TP=2: real weights, real tokenizer, stop string."""
    checkpoint = tmp_path / "smollm2"
    make_smollm2(checkpoint, padded=True, train_prompts=64, eval_prompts=8)
    keys = {
        "run.dir": tmp_path / "runs",
        "run.name": "smollm2",
        "run.steps": 2,
        "model.path": checkpoint / "model",
        "data.train": json.dumps([str(checkpoint / "train.jsonl")]),
        "rollout.prompts_per_step": 4,
        "rollout.prompts_per_generation": 4,
        "logging.wandb": "disabled",
        "checkpoint.export_final": "false",
    }
    example = str(ROOT / "examples/smollm2_arithmetic/run.toml")
    command = [sys.executable, "-m", "stare_megatron", "train", example, "--quiet"]
    done = subprocess.run(
        [*command, *(f"{key}={value}" for key, value in keys.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = jsonl.read(tmp_path / "runs/smollm2/metrics.jsonl")
    assert len(rows) == 2
    assert all(row["mismatch/mean"] < 1e-3 and row["sync/probe"] < 1e-3 for row in rows)
    assert rows[0]["reward/mean"] > 0.3  # the pretrained model can do much of it
