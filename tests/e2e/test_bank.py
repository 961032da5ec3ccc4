"""A stream that is stopped goes on with what it had, with the real parts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.checkpoint import Outstanding, read_ahead
from stare_megatron.metrics import jsonl
from stare_megatron.sync.check import BOUNDS
from tests.e2e import test_train as demo
from tests.e2e.rescoring import EVERY_VERSION, rescored
from tests.e2e.test_sampling_modes import STREAM

pytestmark = pytest.mark.runs
MORE = 3
COUNTS = ("bank/groups", "bank/graded", "bank/partial", "bank/again")
SETTINGS: dict[str, object] = (
    STREAM
    | EVERY_VERSION
    | {
        "inference.vllm.max_num_seqs": 12,
        "rollout.dynamic_sampling": False,  # so that what goes on is learned from
        "run.resume": "auto",
    }
)

material = demo.material


def stopped(material: Path, runs: Path) -> int:
    """A run that gets SIGTERM after four steps; the step that it saved."""
    process = subprocess.Popen(
        demo.arguments(material, runs, **SETTINGS | {"run.steps": 40}),
        cwd=demo.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = runs / "e2e/metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()[-3000:]  # type: ignore[union-attr]
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output[-3000:]
    return int((runs / "e2e/checkpoints/latest").read_text().strip().removeprefix("step_"))


def outstanding(run: Path, step: int) -> tuple[Outstanding, set[int]]:
    """What a checkpoint names, and the seeds of those that are finished and on its shelf."""
    kept = read_ahead(run / f"checkpoints/step_{step:06d}")
    assert isinstance(kept, Outstanding)
    return kept, {int(file.stem) for file in (run / "bank" / kept.bank).glob("*.npz")}


def resumed(material: Path, runs: Path, step: int) -> tuple[str, list[jsonl.Row], list[dict[str, Any]]]:
    """What a run says that goes on from a step, the rows of the whole run, and all its samples; every prompt is
    learned from once, and each token has the log-prob that its version's policy gives it."""
    run, last = runs / "e2e", step + MORE
    command = demo.arguments(material, runs, **SETTINGS | {"run.steps": last})
    again = subprocess.run(command, cwd=demo.ROOT, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    rows = jsonl.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    assert all(row["sync/staleness"] <= 2 for row in rows)
    assert all(row[name] == 0 for row in rows if row["step"] != step + 1 for name in COUNTS)
    by_step = [demo.prompts_of(run / f"samples/step_{number:06d}.jsonl") for number in range(1, last + 1)]
    groups = [{sample["prompt_id"] for sample in samples} for samples in by_step]
    assert all(len(found) == 32 for found in groups)
    assert len(set().union(*groups)) == 32 * last
    assert max(stretch.gap for stretch in rescored(run, material / "model")) < BOUNDS["float32"]
    return again.stdout, rows, [sample for samples in by_step for sample in samples]


def test_a_stream_that_is_stopped_goes_on_with_what_it_had(material: Path, tmp_path: Path) -> None:
    saved = stopped(material, tmp_path)
    kept, shelf = outstanding(tmp_path / "e2e", saved)
    assert shelf
    said, rows, _ = resumed(material, tmp_path, saved)
    assert f"{len(shelf)} finished groups, and of others" in said
    first = rows[saved]
    assert first["bank/groups"] == len(shelf)
    assert sum(first[name] for name in COUNTS[1:]) == 8 * (len(kept.requests) - len(shelf))
