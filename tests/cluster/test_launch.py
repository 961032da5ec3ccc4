"""`launch slurm` on two machines, with Slurm's programs in place of Slurm: Ray, ranks, engines and the run are real."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stare_megatron.metrics import jsonl
from tests import programs
from tests.cluster import slurm
from tests.cluster.machines import ROOT, Machine, machines, why_not
from tests.cluster.runs import learned

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400), pytest.mark.skipif(bool(why_not()), reason=why_not())]

STEPS = 12  # enough for a job that is told to stop at the second not to have ended by itself


@pytest.fixture
def pair(shared: Path) -> Iterator[list[Machine]]:
    (shared / "pair").mkdir()
    with machines(2, shared / "pair") as made:
        yield made


def settings(shared: Path, runs: str) -> list[str]:
    keys = {
        "run.dir": shared / runs,
        "run.steps": STEPS,
        "model.path": shared / "material/model",
        "data.train": json.dumps([str(shared / "material/train.jsonl")]),
        "rollout.prompts_per_step": 4,
        "trainer.tensor_parallel": 1,
        "trainer.world_size": 4,
        "inference.engines": 2,
        "logging.wandb": "disabled",
        "checkpoint.every": 50,
    }
    return [str(ROOT / "examples/demo_cpu/run.toml"), *(f"{key}={value}" for key, value in keys.items())]


def test_a_job_that_slurm_stops_goes_on_as_if_it_had_not(shared: Path, pair: list[Machine]) -> None:
    """SIGTERM to the batch script, as before a time limit: the step ends, is saved, and the job queued again; the whole
    is bit for bit the run that was not stopped. Logs of both nodes are in one folder, for each start."""
    slurms = slurm.install(shared / "slurm", [(machine.name, machine.pid) for machine in pair])
    environment = {
        "PATH": f"{slurms}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": "/tmp",  # of each machine its own
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "STARE_DEVICE": "cpu",
    }
    launch = [sys.executable, "-m", "stare_megatron", "launch", "slurm", *settings(shared, "runs")]
    done = programs.run(
        [*launch, "--gpus-per-node=0", "--cpus-per-node=4"],
        env=os.environ | environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    run, logs = shared / "runs/demo", shared / "runs-launch/demo/logs"
    deadline = time.monotonic() + 1200
    while not (run / "metrics.jsonl").exists() or len(jsonl.read(run / "metrics.jsonl")) < 2:
        said = (shared / "slurm/ended").exists() and "".join(file.read_text() for file in logs.glob("*/*.log"))
        assert not said, said[-5000:]
        assert time.monotonic() < deadline, f"no step 2 within 1200 s; see {logs}"
        time.sleep(0.2)
    os.kill(int((shared / "slurm/pid").read_text()), signal.SIGTERM)
    ended = slurm.wait_for(shared / "slurm/ended", 1200)
    assert ended == "0 after 1", (logs / "7-1/n1.log").read_text()[-5000:]
    saved = sorted(folder.name for folder in (run / "checkpoints").glob("step_*"))
    assert len(saved) == 2, saved  # of the stop, and of the end
    assert saved[-1] == f"step_{STEPS:06d}"
    for start, code in (("7-0", "130"), ("7-1", "0")):
        assert (logs / start / "code").read_text().strip() == code
        for name in ("n1", "n2"):
            assert (logs / start / f"{name}.log").is_file()
            assert (logs / start / f"ray-{name}" / "raylet.out").is_file()
        assert "n2" in (logs / start / "n1.log").read_text()  # the doctor's table
    firsts = [file.read_text().partition("\n")[0] for file in (run / "logs").glob("trainer*.log")]
    assert {line.split(" on ")[1].split()[0] for line in firsts} == {"n1", "n2"}

    alone = [sys.executable, "-m", "stare_megatron", "train", *settings(shared, "alone"), "--quiet"]
    code, said = pair[1].run(alone)
    assert code == 0, said[-3000:]
    assert learned(run) == learned(shared / "alone/demo")
