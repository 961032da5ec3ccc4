"""A real run whose checkpoints lie on the disks of nodes: killed, its ranks lost, and the disk gone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stare_megatron.convert.torch_dist import Box, TorchDist
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.catalogue import COSTS
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs

ROOT = Path(__file__).parents[2]
STEPS = 4
PROGRAM = ["-m", "stare_megatron"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), folder, 512, 32)
    return folder


def run(material: Path, runs: Path, disk: Path, program: list[str], **settings: object) -> tuple[int, str]:
    """Exit code and output. Every step is saved, every second copied."""
    keys: dict[str, object] = {
        "run.dir": runs,
        "run.name": "r",
        "run.steps": STEPS,
        "run.resume": "auto",
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "rollout.prompts_per_step": 8,
        "trainer.tensor_parallel": 2,
        "checkpoint.every": 1,
        "checkpoint.asynchronous": "false",
        "checkpoint.local": disk,
        "checkpoint.durable_every": 2,
        "checkpoint.export_final": "false",
        "logging.wandb": "disabled",
    } | settings
    example = str(ROOT / "examples/demo_cpu/run.toml")
    command = [sys.executable, *program, "train", example, "--quiet", *(f"{k}={v}" for k, v in keys.items())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = programs.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    return done.returncode, done.stdout


def learned(runs: Path) -> list[dict[str, str]]:
    """What the steps found and did, without what it cost; as text, since NaN is not equal to itself."""
    rows = jsonl.read(runs / "r/metrics.jsonl")
    return [{name: repr(x) for name, x in row.items() if not name.startswith(COSTS)} for row in rows]


def content(folder: Path) -> dict[str, str]:
    """Of a checkpoint: every tensor's digest, and what is not of one tensor, as text."""
    dist = TorchDist(folder)
    assert len(dist.files) >= 2
    found = {"common": repr(dist.common())}
    for key, whole in dist.tensors.items():
        tensor = dist.read(key, Box((0,) * len(whole.shape), whole.shape))
        found[key] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def kept(runs: Path) -> list[str]:
    return sorted(
        path.relative_to(runs / "r/checkpoints").as_posix() for path in (runs / "r/checkpoints").rglob("step_*")
    )


@pytest.mark.runs
@pytest.mark.timeout(1800)
def test_killed_and_resumed(material: Path, tmp_path: Path) -> None:
    """From the disk, and without it from the last copy, the steps are those of a run that nothing happens to, bit for
    bit; a run that has ended leaves nothing on the disk."""
    killer = [str(ROOT / "tests/e2e/killed_run.py"), "rollout", "3"]
    runs, disk = tmp_path / "runs", tmp_path / "disk/stare"
    code, said = run(material, runs, disk, killer)
    assert code == -signal.SIGKILL, said[-3000:]
    assert kept(runs) == ["local/step_000003", "step_000002"]
    (home,) = disk.iterdir()

    # The folder of the run, somewhere else; its links lead to where the disk is no more.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(runs, elsewhere, symlinks=True)
    home.rename(tmp_path / "away")
    code, said = run(material, elsewhere, disk, PROGRAM)
    assert code == 0, said[-3000:]
    assert f"going on from {elsewhere}/r/checkpoints/step_000002, since a newer one on the nodes' own disks" in said
    assert "trainer rank 0" in said
    assert "__0_0.distcp: missing" in said

    (tmp_path / "away").rename(home)
    code, said = run(material, runs, disk, PROGRAM)
    assert code == 0, said[-3000:]
    assert f"going on from {runs}/r/checkpoints/local/step_000003, which every node has whole" in said
    assert kept(runs) == ["step_000003", "step_000004"], "the one it went on from is copied, the last is durable"
    assert list(disk.iterdir()) == []

    whole = tmp_path / "whole"
    code, said = run(material, whole, disk, PROGRAM, **{"checkpoint.local": "", "checkpoint.durable_every": 1})
    assert code == 0, said[-3000:]
    assert len(learned(whole)) == STEPS
    assert learned(runs) == learned(whole)
    assert learned(elsewhere) == learned(whole)
    for step in (3, 4):
        one, other = (content(f / f"r/checkpoints/step_{step:06d}/trainer") for f in (runs, whole))
        assert len(other) > 10
        assert one == other


@pytest.mark.slow
def test_ranks_come_back_from_the_disk(material: Path, tmp_path: Path) -> None:
    fault = [str(ROOT / "tests/e2e/faulty_run.py"), "trainer_1:KILL:update:3"]
    code, said = run(material, tmp_path / "runs", tmp_path / "disk", fault)
    assert code == 0, said[-3000:]
    assert f"going on from {tmp_path}/runs/r/checkpoints/local/step_000003, which every node has whole" in said
    assert "trainer ranks: RESTARTING -> HEALTHY: going on from step 3" in said
    assert [row["step"] for row in jsonl.read(tmp_path / "runs/r/metrics.jsonl")] == list(range(1, STEPS + 1))
    assert kept(tmp_path / "runs") == ["step_000003", "step_000004"]
