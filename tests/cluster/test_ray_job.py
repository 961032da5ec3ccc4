"""A run as a Ray job: submitted to the dashboard's job server, read, stopped, and gone on with by another job."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.machines import Machine, machines, why_not
from tests.cluster.runs import SMALL, steps, wait_for_step, words

_WHY_NOT = why_not() or ("" if importlib.util.find_spec("aiohttp_cors") else "the extra `cluster` is not installed")
pytestmark = [
    *(pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)),
    pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT),
]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SERVER = "http://10.77.0.1:8265"


@pytest.fixture(scope="module")
def pair(shared: Path) -> Iterator[list[Machine]]:
    (shared / "pair").mkdir()
    with machines(2, shared / "pair") as made:
        made[0].ray(2, "--include-dashboard=true", "--dashboard-host=0.0.0.0", RAY_JOB_STOP_WAIT_TIME_S="600")
        made[1].ray(2)
        yield made


def job(machine: Machine, *command: str) -> str:
    """What `ray job` says there."""
    code, said = machine.run([*RAY, "job", *command, f"--address={SERVER}"])
    assert code == 0, said[-3000:]
    return said


def submit(machine: Machine, *settings: str) -> str:
    """The job's name. On the head its server is found without a word."""
    address = [] if machine.number == 1 else [f"--address={SERVER}"]
    launch = [sys.executable, "-m", "stare_megatron", "launch", "ray-job", *settings, *address]
    code, said = machine.run([*launch, "--gpus-per-node=0", "--cpus-per-node=2"])
    assert code == 0, said[-3000:]
    [name] = set(re.findall(r"raysubmit_\w+", said))
    return name


def test_a_job_that_is_stopped_is_gone_on_with(shared: Path, pair: list[Machine]) -> None:
    """SIGTERM reaches the driver and nobody else: the step ends and is saved, and the job server sees the end at once.
    The machines have no init that reaps orphans, as most containers have none."""
    head, worker = pair
    settings = SMALL | {"checkpoint.every": 50}
    first = submit(worker, *words(shared, shared / "runs", **settings | {"run.steps": 50}))
    run = shared / "runs/demo"
    wait_for_step(run, 2)
    assert "step 1/50" in job(head, "logs", first)
    assert f"'{first}' was stopped" in job(worker, "stop", first)
    last = steps(run)[-1]
    assert (run / "checkpoints/latest").read_text() == f"step_{last:06d}\n"
    said = job(worker, "logs", first)
    assert "stopping after this step" in said
    assert f"checkpoints/step_{last:06d}" in said.splitlines()[-2], said[-3000:]
    hosts = {file.read_text().split(" on ")[1].split()[0] for file in (run / "logs").glob("trainer*.log")}
    assert hosts == {"n1", "n2"}

    second = submit(head, *words(shared, shared / "runs", **settings | {"run.steps": last + 1}))
    job(head, "logs", "--follow", second)
    assert f"'{second}' succeeded" in job(head, "status", second)
    assert steps(run) == list(range(1, last + 2))


def test_a_job_starts_no_second_ray(shared: Path, pair: list[Machine]) -> None:
    """What a user's own `ray job submit` with the default address is told; the job fails."""
    train = ["stare-megatron", "train", *words(shared, shared / "own", **{"cluster.address": "local"})]
    code, said = pair[0].run([*RAY, "job", "submit", f"--address={SERVER}", "--", *train])
    assert code == 1, said[-3000:]
    assert "cluster.address=auto" in said
    assert not (shared / "own").exists()
