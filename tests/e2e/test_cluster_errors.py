"""What the driver says when actors on a real Ray fail, differ or hang, and when a cluster cannot be joined."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from stare_megatron.cluster import families, runtime
from stare_megatron.cluster import trainers as trainers_of_a_run
from stare_megatron.cluster.engines import EngineGroup
from stare_megatron.cluster.lookout import Lookout
from stare_megatron.cluster.placement import Slot
from stare_megatron.cluster.roll_call import RollCall
from stare_megatron.cluster.trainers import TrainerGroup
from stare_megatron.config import ClusterConfig, Config
from stare_megatron.errors import RanksLostError, RunError, UserError
from stare_megatron.host.ports import free_port
from tests import programs
from tests.configs import configuration

SAID: list[str] = []


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with runtime.cluster(ClusterConfig(), 4):
        yield


@ray.remote(num_cpus=0)
class Rank:
    """A trainer's actor: one that is blocked in a push, as in a broadcast that nobody receives, and fails to start."""

    def __init__(self, package: str = "") -> None:
        if package:
            __import__(package)

    def push(self, version: int, sums: str = "none", engines: Sequence[str] = ()) -> None:
        time.sleep(3600)

    def end(self) -> None:
        os._exit(1)

    def hello(self) -> runtime.Station:
        return runtime.station()


def crew(*names: str, named_hosts: bool = False) -> runtime.Crew:
    return runtime.Crew(names, SAID.append, named_hosts=named_hosts)


def make_pair(config: Config, logs: Path) -> tuple[TrainerGroup, EngineGroup, Any]:
    """Two ranks that are blocked, connected to an engine whose vLLM was never started."""
    slots = [Slot({"num_cpus": 0}, {}, 0, 0)]
    lookout = Lookout(config.watchdog, logs, SAID.append)
    engines = EngineGroup(config, slots, "gloo", None, [], logs, lookout)  # pyright: ignore
    trainers = TrainerGroup.__new__(TrainerGroup)
    trainers._config, trainers._engines, trainers._transport = config, engines, "gloo"
    trainers._crew = crew("trainer rank 0", "trainer rank 1")
    trainers._actors = [Rank.remote(), Rank.remote()]
    trainers._roll = RollCall(trainers._actors, trainers._crew, 60.0)
    trainers._turn, trainers._moved_on = threading.RLock(), True
    trainers._joined = {0: engines.actors[0]}
    return trainers, engines, engines.actors[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_POLL_S", 0.2)
    monkeypatch.setattr(trainers_of_a_run, "_RETURN_SECONDS", 2.0)


def test_a_push_ends_when_an_engine_fails_in_it(cluster, quick, tmp_path):
    trainers, engines, engine = make_pair(configuration(), tmp_path)
    engines._keeper.tick = lambda: False  # it has not started, and could not answer
    engine.call.remote("update_weights", {})  # rank 0 hears of it, and cannot say so
    with pytest.raises(
        RanksLostError,
        match=r"trainer rank 0, trainer rank 1: no return from a push within 2 s of engine 0: update_weights: .",
    ):
        trainers.push(1, [0])


def test_a_push_ends_when_an_engine_dies_in_it(cluster, quick, tmp_path):
    trainers, engines, engine = make_pair(configuration(), tmp_path)
    ray.get(engine.hello.remote())
    ray.kill(engine)
    with pytest.raises(RanksLostError, match="no return from a push within 2 s of engine 0: its process died"):
        trainers.push(1, [0])
    assert engines.any_lost([0])


def test_a_push_that_takes_too_long_names_who_is_late(cluster, quick, tmp_path):
    trainers, _, _ = make_pair(configuration(sync={"push_timeout": 1.0}), tmp_path)
    with pytest.raises(RunError, match=r"trainer rank 0, trainer rank 1: no answer within 1 s \(push\)"):
        trainers.push(1, [0])


def test_a_wait_says_for_whom_and_for_what(cluster, quick, monkeypatch):
    monkeypatch.setattr(runtime, "_SAY_S", 0.5)
    SAID.clear()
    ranks = [Rank.remote(), Rank.remote()]
    answered = ranks[0].hello.remote()
    ray.get([answered, ranks[1].hello.remote()])
    both = crew("trainer rank 0", "trainer rank 1")

    def end() -> None:
        if SAID:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        both.wait([answered, ranks[1].push.remote(1)], "update", watch=end)
    assert re.fullmatch(r"waiting \d+ s for trainer rank 1 \(update\)", SAID[-1])
    with pytest.raises(RunError, match=r"^trainer rank 1: no answer within 1 s \(update\)"):
        both.wait([answered, ranks[1].push.remote(1)], "update", 1)


def test_a_hanging_engine_is_named_while_groups_are_sampled(cluster, monkeypatch):
    monkeypatch.setattr(runtime, "_SAY_S", 0.5)
    SAID.clear()
    rank = Rank.remote()
    hangs, slow = rank.push.remote(1), Rank.remote().hello.remote()
    both = crew("engine 0", "engine 1")
    assert both.first({hangs: 0, slow: 1}, "sample") == slow
    monkeypatch.setattr(both, "_say", _raise)
    with pytest.raises(InterruptedError):
        both.first({hangs: 0}, "sample")


def _raise(said: str) -> None:
    assert re.fullmatch(r"waiting \d+ s for engine 0 \(sample\)", said)
    raise InterruptedError


def keep_checking(roll: RollCall) -> None:
    """For five minutes at most."""
    for _ in range(3000):
        roll.check()
        time.sleep(0.1)


def test_a_lost_rank_is_named_and_not_who_suffers_from_it(cluster, quick):
    ranks = [Rank.remote(), Rank.remote()]
    both = runtime.Crew(["rank 0", "rank 1"], SAID.append, named_hosts=False, lost=RanksLostError)
    roll = RollCall(ranks, both, 60.0)
    ray.get([rank.hello.remote() for rank in ranks])
    roll.check()
    with roll.suspended():  # busy
        ranks[1].end.remote()
        with pytest.raises(RanksLostError, match="rank 1: its process died"):
            roll.name_the_dead()
        roll.check()
    with pytest.raises(RanksLostError, match="rank 1: its process died"):
        keep_checking(roll)


def test_an_idle_rank_that_is_silent_is_named(cluster):
    rank = Rank.remote()
    ray.get(rank.hello.remote())
    rank.push.remote(1)
    roll = RollCall([rank], runtime.Crew(["rank 0"], SAID.append, named_hosts=False, lost=RanksLostError), 1.0)
    with pytest.raises(RanksLostError, match=r"rank 0: no answer for [1-9]\d* s \(inference\.answer_timeout\)"):
        keep_checking(roll)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_processes_are_killed_with_those_they_started_stopped_or_not(cluster):
    parent = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    node = ray.get_runtime_context().get_node_id()
    times = (psutil.Process(parent.pid).create_time(), child.create_time())
    child.suspend()
    assert (
        ray.get(families.stopped(families.Family(node, ((parent.pid, times[0]), (child.pid, times[1]))))) == child.pid
    )
    assert not ray.get(families.stopped(families.Family(node, ((parent.pid, times[0]), (child.pid, times[1] - 100)))))
    later = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert later.stdout is not None
    started = psutil.Process(int(later.stdout.readline()))  # since the family was looked at
    parent.kill()
    parent.wait()
    other = subprocess.Popen(["sleep", "1000"])  # a process id that somebody else has by now
    first = later.pid, psutil.Process(later.pid).create_time()
    family = families.Family(node, ((parent.pid, times[0]), (child.pid, times[1]), first, (other.pid, times[1] - 100)))
    ray.get(families.end(family))
    later.wait(120)
    deadline = time.monotonic() + 120
    while any(map(lives, (child, started))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(lives, (child, started)))
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_package_missing_on_a_node_is_named(cluster):
    with pytest.raises(RunError, match=r"its process died: ModuleNotFoundError: No module named 'nowhere_at_all'"):
        crew("engine 0").meet([Rank.remote("nowhere_at_all").hello.remote()], 400)


def test_every_actor_has_the_drivers_versions_and_is_named_by_its_host(cluster):
    here = runtime.station()
    there = dataclasses.replace(here, host="b", address="10.0.0.2", versions=here.versions | {"torch": "1.0"})
    both = crew("engine 0", "engine 1", named_hosts=True)
    with pytest.raises(UserError, match=r"^engine 1 on b \(10\.0\.0\.2\): torch 1\.0, the driver's is [\d.]+: every"):
        both.meet([Rank.remote().hello.remote(), ray.put(there)], 400)
    slow = dataclasses.replace(there, versions=here.versions, missing=("/opt/lib/libiomp5.so",))
    with pytest.raises(
        UserError, match=r"^engine 0 on b \(10\.0\.0\.2\): no /opt/lib/libiomp5\.so, which the driver's"
    ):
        crew("engine 0", named_hosts=True).meet([ray.put(slow)], 400)
    assert both.names[0] == f"engine 0 on {here.host} ({here.address})"
    assert set(here.versions) >= {"Python", "torch", "ray", "stare_megatron"}


def test_a_log_begins_with_its_process_and_host(cluster, tmp_path):
    engine = make_pair(configuration(), tmp_path)[2]
    ray.get(engine.hello.remote())
    first = (tmp_path / "engine_0.log").read_text().splitlines()[0]
    assert re.fullmatch(rf"engine_0 on {re.escape(runtime.station().host)} \([\d.:a-f]+\), process \d+", first)


@contextlib.contextmanager
def head(**environment: str) -> Iterator[str]:
    """A `ray start --head` of its own; its address."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # the paths of its sockets must be short
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=1", "--include-dashboard=false", "--object-store-memory=100000000"]
    command += [f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=os.environ | environment, cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 400
        while "runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()  # noqa: PT018
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(120)
        shutil.rmtree(folder, ignore_errors=True)


JOIN = """
import sys
from stare_megatron.cluster import families, runtime
from stare_megatron.config import ClusterConfig
from stare_megatron.errors import UserError
try:
    with runtime.cluster(ClusterConfig(address=sys.argv[1]), 1):
        print("joined")
except UserError as e:
    print(e)
"""


def join(address: str, **environment: str) -> tuple[str, str]:
    """What a driver prints, and what is on its stderr."""
    done = programs.run([sys.executable, "-c", JOIN, address], env=os.environ | environment)
    return done.stdout, done.stderr


@pytest.mark.runs
def test_another_token_is_told_from_a_cluster_that_does_not_answer(tmp_path, monkeypatch):
    """Ray itself says "Failed to connect" for both."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32) as address:
        assert join(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)[0] == "joined\n"
        with ThreadPoolExecutor() as pool:  # each waits long
            told = pool.submit(join, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="b" * 32)
            none = join(address, RAY_AUTH_MODE="token", HOME=str(tmp_path))
        other = told.result()
    for said, errors in (other, none):
        assert said.startswith(f"cluster.address = '{address}': Ray refuses this process's token")
        assert "RAY_AUTH_MODE=disabled everywhere" in said
        assert "gcs_client" not in errors


def test_a_stale_ray_address_is_named_at_once(tmp_path):
    """Ray would try for minutes."""
    stale = f"127.0.0.1:{free_port()}"
    said, _ = join("auto", RAY_ADDRESS=stale)
    assert said.startswith(f"cluster.address = \"auto\" follows RAY_ADDRESS = '{stale}', where nothing answers")
    assert "unset RAY_ADDRESS" in said
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(stale)
    said, _ = join("auto", RAY_ADDRESS="", RAY_TMPDIR=str(tmp_path))
    assert said.startswith(f'cluster.address = "auto" follows this machine\'s last `ray start`, {stale}, where nothing')
