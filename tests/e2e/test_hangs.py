"""Hangs of real processes: two gloo ranks under Ray, and whole runs with vLLM. Who is at fault is named, and nothing is
left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from stare_megatron.cluster import lookout as lookout_module
from stare_megatron.cluster import runtime
from stare_megatron.cluster.activity import ActivityLog
from stare_megatron.cluster.doing import Answers, ray_actor
from stare_megatron.cluster.lookout import Lookout
from stare_megatron.config import ClusterConfig
from stare_megatron.config.watchdog import WatchdogConfig
from stare_megatron.errors import HangError
from stare_megatron.host.device import trainer_environment
from stare_megatron.host.ports import free_port
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.events import FILE
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests.contracts.source import ROOT
from tests.flights import read_flight_json


@ray_actor
class GlooRank(Answers):
    """A rank that takes part in an all-reduce of the tensor-parallel group, or does not."""

    def __init__(self, rank: int, logs: Path) -> None:
        runtime.enter_actor(logs, f"rank_{rank}")
        self._activity = ActivityLog()
        self._rank = rank

    def hello(self) -> runtime.Station:
        return runtime.station()

    def join(self, port: int) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=self._rank, world_size=2)
        self._group = dist.new_group([0, 1], group_desc="TENSOR_MODEL_PARALLEL_GROUP")

    def update(self, fault: str) -> None:
        import torch
        import torch.distributed as dist

        with self._activity.during("update"):
            if fault == "sleep":
                oversleep()
            if fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.all_reduce(torch.ones(8), group=self._group)


def oversleep() -> None:
    time.sleep(3600)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with runtime.cluster(ClusterConfig(), 3):
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_POLL_S", 0.5)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", ["sleep", "stop"])
def test_a_rank_that_does_not_enter_a_collective_is_named(cluster, quick, tmp_path, fault):
    said: list[str] = []
    lookout = Lookout(WatchdogConfig(first=15.0), tmp_path, said.append)
    lookout.step = 7
    crew = runtime.Crew(["trainer rank 0", "trainer rank 1"], said.append, named_hosts=False, lookout=lookout)
    environment = {"env_vars": trainer_environment()}
    actors: list[Any] = [
        GlooRank.options(num_cpus=1, runtime_env=environment).remote(rank, tmp_path / "logs") for rank in range(2)
    ]
    lookout.add(lookout_module.RANKS, crew, actors)
    crew.meet([actor.hello.remote() for actor in actors], 400)
    port = free_port()
    crew.wait([actor.join.remote(port) for actor in actors], "start", 400)
    with lookout.watching(), lookout.during("update"):
        for _ in range(2):
            crew.wait([actor.update.remote("") for actor in actors], "update")
        with pytest.raises(HangError) as e:
            crew.wait([actor.update.remote(fault if rank else "") for rank, actor in enumerate(actors)], "update")
    assert e.value.culprits == ("trainer rank 1",)
    where = {"sleep": r"is in oversleep \(\S+test_hangs\.py:\d+\)", "stop": r"is stopped \(process \d+\)"}[fault]
    assert re.search(
        r"^trainer rank 0 and trainer rank 1: no answer within \d+ s \(update of step 7\): trainer rank 1 never "
        rf"entered all_reduce #3 of the tensor-parallel group; trainer rank 0 waits; it .*{where} ",
        str(e.value),
    )
    assert said[-1].endswith("asking every process what it is at")

    folder = tmp_path / "forensics/7-update"
    assert str(folder) in str(e.value)
    assert "never entered all_reduce #3" in (folder / "verdict.txt").read_text()
    waiting = read_flight_json((folder / "flight/trainer_rank_0.json").read_text()).operations[-1]
    assert (waiting.kind, waiting.number, waiting.finished) == ("all_reduce", 3, False)
    written = sorted(p.name for p in (folder / "stacks").iterdir())
    pids = [station.process for station in crew.stations if station]
    assert {"driver.txt", "trainer_rank_0.txt", f"trainer_rank_0.{pids[0]}.txt"} <= set(written)
    assert "all_reduce" in (folder / f"stacks/trainer_rank_0.{pids[0]}.txt").read_text()  # as it wrote them itself
    assert (f"trainer_rank_1.{pids[1]}.txt" in written) == (fault == "sleep")
    (seen,) = re.findall(
        rf"^  {pids[1]} .*: ([a-z-]+), \d+ threads", (folder / "processes.txt").read_text(), re.MULTILINE
    )
    assert (seen == "stopped") == (fault == "stop")
    assert "GiB" in (folder / "machines.txt").read_text()
    assert "rank_1 on" in (folder / "logs/trainer_rank_1.txt").read_text()
    until = time.monotonic() + 120
    while psutil.pid_exists(pids[1]):  # its raylet has yet to hear of the end
        assert time.monotonic() < until
        time.sleep(0.1)
    for actor in actors[:1]:
        ray.kill(actor)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs") / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), folder, 512, 32)
    return folder


METHOD = {"algorithm.method": f"{ROOT / 'tests/e2e/hanging.py'}:HANGING"}
RUNS = {
    "rank stopped in update": (
        [],
        METHOD | {"algorithm.settings.how": "stop"},
        r"trainer rank 1 never entered all_reduce #\d+ of the tensor-parallel group; trainer rank 0 waits; it is "
        r"stopped \(process \d+\)",
        "2-update",
    ),
    "rank asleep in update": (
        [],
        METHOD | {"algorithm.settings.how": "sleep"},
        r"trainer rank 1 never entered all_reduce #\d+ of the tensor-parallel group; trainer rank 0 waits; it has been "
        r"at update for \d+ s, is in oversleep \(\S+hanging\.py:\d+\)",
        "2-update",
    ),
    "engine stopped in rollout": (
        ["tests/e2e/killed_run.py", "stopped-engine", "1"],
        {"inference.vllm.max_num_seqs": 2},  # so that it samples for seconds, and is at it when it is stopped
        r"engine 0 is stopped \(process \d+\)",
        "2-rollout",
    ),
}


def ended(material: Path, runs: Path, before: list[str], settings: Mapping[str, object]) -> tuple[int, str]:
    """Exit code and output of a run of two ranks that split layers; nothing that it started lives on. `before`: the
    command, up to its arguments; empty: the program itself."""
    keys: dict[str, object] = {
        "run.dir": runs,
        "run.name": "hangs",
        "run.steps": 5,
        "trainer.tensor_parallel": 2,
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "rollout.prompts_per_step": 8,
        "rollout.dynamic_sampling": "false",
        "rollout.max_refills": 0,
        "watchdog.first": 40,
        "watchdog.floor": 40,
        "inference.answer_timeout": 600,
        "logging.wandb": "disabled",
    } | dict(settings)
    command = [sys.executable, *(before or ["-m", "stare_megatron"]), "train", "examples/demo_cpu/run.toml", "--quiet"]
    process = subprocess.Popen(
        [*command, *(f"{key}={value}" for key, value in keys.items())],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen: set[psutil.Process] = set()
    until = time.monotonic() + 1200
    while process.poll() is None and time.monotonic() < until:
        seen.update(psutil.Process(process.pid).children(recursive=True))
        time.sleep(1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    _, left = psutil.wait_procs(seen, timeout=300)
    assert [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    return process.returncode, output


@pytest.mark.runs
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_hangs_and_may_not_go_on_ends_and_says_who_is_at_fault(material, tmp_path, case):
    before, settings, line, folder = RUNS[case]
    code, output = ended(material, tmp_path, before, settings | {"run.restarts": 0, "checkpoint.every": 0})
    assert code == 1, output[-3000:]
    assert re.search(rf"the run stopped: .*no answer within \d+ s \(.* of step 2\): {line} \(", output), output[-3000:]
    at = tmp_path / "hangs/forensics" / folder
    assert re.search(line, (at / "verdict.txt").read_text())
    assert {p.name.partition(".")[0] for p in (at / "stacks").iterdir()} >= {"driver", "trainer_rank_0"}
    saved = (tmp_path / "hangs/checkpoints/step_000001").is_dir()
    assert saved == (case == "engine stopped in rollout")  # a rank at fault takes its part of the weights along


@pytest.mark.runs
@pytest.mark.timeout(1800)
def test_a_run_that_hangs_goes_on_with_new_ranks(material, tmp_path):
    """As by default: the one at fault is named and killed, and the ranks are started again from the last checkpoint."""
    settings = METHOD | {"algorithm.settings.mark": tmp_path / "hung", "checkpoint.every": 1}
    code, output = ended(material, tmp_path, [], settings)
    assert code == 0, output[-3000:]
    assert (tmp_path / "hung").is_file()
    verdict = (tmp_path / "hangs/forensics/2-update/verdict.txt").read_text()
    assert re.search(r"trainer rank 1 never entered all_reduce #\d+ of the tensor-parallel group", verdict)
    # Step 1 may be on its way to the disk still when the ranks are ended.
    assert re.search(r"trainer ranks: RESTARTING -> HEALTHY: going on from step [01]\b", output)
    rows = jsonl.read(tmp_path / "hangs/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["mismatch/mean"] < 1e-3 and row["sync/probe"] < 1e-3 for row in rows)
    events = map(json.loads, (tmp_path / "hangs" / FILE).read_text().splitlines())
    assert [row["new"] for row in events if row["who"] == "trainer ranks"] == ["DEAD", "RESTARTING", "HEALTHY"]
