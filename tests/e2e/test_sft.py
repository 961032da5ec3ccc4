"""Supervised training with the real parts: two epochs on two ranks, stopped in both ways and resumed, and what `train`
makes of its export."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from stare_megatron import tasks
from stare_megatron.checkpoint import store
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.catalogue import COSTS
from stare_megatron.tasks.folder import write_prompts
from stare_megatron.tasks.tiny_model import default_settings, make_model, make_tokenizer, save
from tests import programs

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parents[2]
STOPPED = [sys.executable, str(Path(__file__).with_name("stopped_sft.py"))]
PLAIN = [sys.executable, "-m", "stare_megatron"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model, worked answers of its task, prompts, and a configuration."""
    folder = tmp_path_factory.mktemp("sft")
    task = tasks.get("order_free_sum")
    settings = dataclasses.replace(default_settings("order_free_sum", layers=2, seed=1), max_batches=0)
    save(make_model(settings), make_tokenizer(task), folder / "model")
    rng = random.Random(0)
    for name, split, count in (("train", "train", 200), ("eval", "eval", 40)):
        prompts = task.prompts(split, count, 0)
        rows = [{"prompt": p.text, "completion": task.trace(p, rng)} for p in prompts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_prompts(folder / "prompts.jsonl", task.name, task.prompts("train", 64, 0))
    (folder / "sft.toml").write_text(
        f"""
        run.dir = "{folder / "runs"}"
        model = {{path = "{folder / "model"}", dtype = "float32"}}
        data = {{train = "{folder / "train.jsonl"}", eval = "{folder / "eval.jsonl"}"}}
        sft = {{epochs = 2, batch_sequences = 50, max_tokens = 64}}
        trainer = {{world_size = 2, micro_batch_tokens = 256, optimizer = {{lr = 3e-3, schedule = "cosine"}}}}
        checkpoint.every = 3
        logging = {{wandb = "disabled", tensorboard = false}}
        """
    )
    return folder


def run(material: Path, name: str, *more: str, stop: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*(STOPPED if stop else PLAIN), *stop, "sft", str(material / "sft.toml"), "--quiet", f"run.name={name}"]
    return programs.run([*command, *more], cwd=ROOT, start_new_session=True)


@pytest.fixture(scope="module")
def whole(material: Path) -> Path:
    """The folder of a run of two epochs that nothing stopped."""
    done = run(material, "whole")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == "", "Ray and Megatron-Core are not heard of"
    assert "(raylet)" not in done.stdout
    return material / "runs/whole"


def rows(folder: Path) -> list[dict[str, Any]]:
    """What is logged of each step, without costs, and the held-out losses."""
    steps = [{k: repr(v) for k, v in r.items() if not k.startswith(COSTS)} for r in jsonl.read(folder / jsonl.FILE)]
    return [*steps, *jsonl.read(folder / "eval.jsonl")]


def assert_same(folder: Path, whole: Path) -> None:
    import torch

    assert rows(folder) == rows(whole)
    mine, want = (load_file(f / "hf/model.safetensors") for f in (folder, whole))
    assert mine.keys() == want.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in want.items())


def test_a_run_of_two_epochs(material: Path, whole: Path) -> None:
    logged = jsonl.read(whole / jsonl.FILE)
    assert [row["step"] for row in logged] == list(range(1, 9))
    assert [row["data/epoch"] for row in logged] == [0] * 4 + [1] * 4
    assert all(row["sft/sequences"] == 50 for row in logged)
    assert logged[-1]["update/loss"] < logged[0]["update/loss"] - 1.0
    held_out = {row["step"]: row["sft/held_out_loss"] for row in jsonl.read(whole / "eval.jsonl")}
    assert list(held_out) == [0, 4, 8]
    assert held_out[8] < held_out[4] < held_out[0]
    for name in ("config.toml", "run.json", "curves.png", "checkpoints/latest", "logs", "trace.jsonl", "hf"):
        assert (whole / name).exists(), name


def test_a_killed_run_goes_on_bit_equal(material: Path, whole: Path) -> None:
    at_once = "checkpoint.asynchronous=false"  # else a slow disk may not have step 3 by then
    done = run(material, "killed", at_once, stop=("KILL", "4"))
    assert done.returncode == -9
    assert [p.name for p in store.complete(material / "runs/killed/checkpoints")] == ["step_000003"]
    done = run(material, "killed", at_once, "run.resume=auto")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same(material / "runs/killed", whole)


def test_sigterm_saves_and_the_run_goes_on_bit_equal(material: Path, whole: Path) -> None:
    done = run(material, "term", stop=("TERM", "3"))
    assert done.returncode == 130, done.stdout[-3000:] + done.stderr[-3000:]
    assert "stare-megatron sft" in done.stdout  # how to go on
    assert store.complete(material / "runs/term/checkpoints")[-1].name == "step_000004"
    done = run(material, "term", "run.resume=auto")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same(material / "runs/term", whole)


def test_train_begins_with_its_export(material: Path, whole: Path) -> None:
    keys = {
        "run.dir": material / "runs",
        "run.name": "rl",
        "run.steps": 1,
        "model.path": whole / "hf",
        "data.train": material / "prompts.jsonl",
        "rollout.prompts_per_step": 4,
        "rollout.group_size": 4,
        "rollout.dynamic_sampling": "false",
        "trainer.optimizer.warmup_steps": 0,
        "logging.wandb": "disabled",
    }
    overrides = [f"{key}={value}" for key, value in keys.items()]
    command = [*PLAIN, "train", str(ROOT / "examples/demo_cpu/run.toml"), "--quiet", *overrides]
    done = programs.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (row,) = jsonl.read(material / "runs/rl" / jsonl.FILE)
    assert row["mismatch/mean"] < 1e-3
    # What supervised training left of the entropy is what the policy begins with.
    last = jsonl.read(whole / jsonl.FILE)[-1]
    assert row["policy/entropy"] == pytest.approx(last["policy/entropy"], abs=0.6)
