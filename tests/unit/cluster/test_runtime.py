"""Errors of Ray as the user meets them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import ray
import ray.exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext  # pyright: ignore[reportAttributeAccessIssue]

from stare_megatron.cluster import runtime
from stare_megatron.config import ClusterConfig
from stare_megatron.errors import LostError, RunError
from tests import programs


def test_a_process_ended_for_want_of_memory_is_one_line(monkeypatch):
    said = (
        "1 worker(s) were killed due to the node running low on memory. It was 23.1GB used / 23.5GB limit\nOOM kill\n"
    )

    def get(ref: Any) -> Any:
        raise ray.exceptions.OutOfMemoryError(said)

    monkeypatch.setattr(ray, "get", get)
    reference: Any = object()
    with pytest.raises(RunError) as e:
        runtime.get(reference, "trainer 1")
    assert "\n" not in str(e.value)
    assert str(e.value).startswith("trainer 1: Ray ended its process: 1 worker(s) were killed due to the node")
    assert "23.1GB used / 23.5GB limit; run less beside it" in str(e.value)


def test_a_node_that_ray_gave_up_is_no_process_that_died(monkeypatch):
    said = "The actor died because its node has died. Node Id: 5f3a, Ip: 10.0.0.2, unexpectedly"
    died = ActorDiedErrorContext(class_name="TrainerActor", actor_id=bytes(16), error_message=said)

    def get(ref: Any) -> Any:
        raise ray.exceptions.ActorDiedError(died)

    monkeypatch.setattr(ray, "get", get)
    reference: Any = object()
    with pytest.raises(LostError, match=r"^trainer rank 1 on b: Ray gave its node up, which is down or was cut off"):
        runtime.get(reference, "trainer rank 1 on b")
    died.error_message = "Worker exits with an exit code 1."
    with pytest.raises(LostError, match=r"^trainer rank 1 on b: its process died: "):
        runtime.get(reference, "trainer rank 1 on b")


def test_a_ray_that_starts_too_slowly_may_be_started_again(monkeypatch):
    """What `Node.__init__` raises, word for word; another exception of no class of its own stays as it is."""
    said = [
        "The current node timed out during startup. This could happen because some of the raylet failed to startup or "
        "the GCS has become overloaded.",
        "anything else",
    ]

    def init(**_: object) -> None:
        raise Exception(said.pop(0))

    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(LostError, match=r"^Ray did not start in 30 s.*Start again$"),
        runtime.cluster(ClusterConfig(), 1),
    ):
        pass
    with pytest.raises(Exception, match=r"^anything else$"), runtime.cluster(ClusterConfig(), 1):
        pass


_TERMINATED = """
import multiprocessing, os, signal, sys, time
from pathlib import Path

import psutil
import ray

from stare_megatron.cluster import runtime
from stare_megatron.config import ClusterConfig

heard = []

@ray.remote
class Actor:
    def __init__(self, folder):
        runtime.enter_actor(folder, "actor")
        self.child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,))
        self.child.start()

    def alive(self):
        return self.child.is_alive()

if __name__ == "__main__":
    with runtime.cluster(ClusterConfig(), 1):
        signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
        actor = Actor.remote(Path(sys.argv[1]))
        assert ray.get(actor.alive.remote())
        started = psutil.Process().children(recursive=True)
        for process in [psutil.Process(), *started]:
            process.terminate()
        os.killpg(os.getpgrp(), signal.SIGTERM)
        signal.signal(signal.SIGHUP, lambda *_: heard.append(1))
        os.killpg(os.getpgrp(), signal.SIGHUP)
        time.sleep(2)
        assert heard
        assert ray.get(actor.alive.remote())
    psutil.wait_procs(started, timeout=120)
    left = [p.name() for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    print("left:", left)
"""


@pytest.mark.parts
def test_everything_but_the_driver_is_deaf_to_sigterm_and_gone_at_the_end(tmp_path):
    """As at the end of a Slurm job, or with `kill -TERM -GROUP`: the run can still save, and leaves nothing behind."""
    script = tmp_path / "terminated.py"
    script.write_text(_TERMINATED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "left: []" in done.stdout


def test_a_node_that_does_not_answer_is_not_said_to_be_dead(monkeypatch):
    def get(ref: Any) -> Any:
        raise ray.exceptions.ActorUnavailableError("RpcError: keepalive watchdog timeout rpc_code: 14", None)

    monkeypatch.setattr(ray, "get", get)
    reference: Any = object()
    with pytest.raises(RunError, match=r"^trainer rank 1: its node does not answer") as e:
        runtime.get(reference, "trainer rank 1")
    assert "died" not in str(e.value)
    assert "keepalive watchdog timeout" in str(e.value)
    assert "the process may still run" in str(e.value)


def test_gloo_uses_the_interface_of_the_nodes_address(monkeypatch):
    """Whatever the host's name resolves to."""
    monkeypatch.setattr(runtime, "node_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # what is there now comes back at the end
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    runtime.use_network_of_node()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    runtime.use_network_of_node()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(runtime, "node_address", lambda: "203.0.113.9")
    runtime.use_network_of_node()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


_LOST = """
import os, signal, time
import ray

from stare_megatron.cluster import runtime
from stare_megatron.config import ClusterConfig

@ray.remote
class Actor:
    def process(self):
        print("on its stdout")
        return os.getpid()

if __name__ == "__main__":
    with runtime.cluster(ClusterConfig(), 1):
        actor = Actor.remote()
        os.kill(ray.get(actor.process.remote()), signal.SIGKILL)
        try:
            runtime.get(actor.process.remote(), "actor 0")
        except runtime.LostError as e:
            print(f"ours: {str(e)[:20]}", flush=True)
        time.sleep(3)  # in which Ray would say it too
"""


@pytest.mark.parts
def test_ray_itself_says_nothing(tmp_path):
    """Neither when it starts and ends, nor of a process that is lost, which `(raylet)` used to be heard of."""
    (tmp_path / "lost.py").write_text(_LOST)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "lost.py")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert (done.stdout, done.stderr) == ("ours: actor 0: its process\n", "")


@pytest.mark.parametrize("said", ["engine 0: no room", "no room"])
def test_who_knows_its_own_name_is_named_once(monkeypatch, said):
    def get(ref: Any) -> Any:
        raise ray.exceptions.RayTaskError("start", "a traceback", RunError(said))

    monkeypatch.setattr(ray, "get", get)
    reference: Any = object()
    for name in ("engine 0", "engine 0 on node-b (10.0.0.2)"):
        with pytest.raises(RunError) as e:
            runtime.get(reference, name)
        assert str(e.value) == f"{name}: no room"


@pytest.mark.parametrize("answer", [KeyboardInterrupt, SystemExit(15)])
def test_ray_is_ended_when_its_start_is_interrupted(monkeypatch, answer):
    """By a signal that we hear, or that Ray does and answers with its own exit."""
    ended = []

    def init(**_):
        raise answer

    monkeypatch.setattr(runtime.ray, "init", init)
    monkeypatch.setattr(runtime, "_shut_down", lambda: ended.append(1))
    with pytest.raises(KeyboardInterrupt), runtime.cluster(ClusterConfig(), 1):
        raise AssertionError("it has not started")
    assert ended == [1]


_STARTING = """
import os, signal, time

import psutil

from stare_megatron.cluster import runtime
from stare_megatron.config import ClusterConfig

try:
    with runtime.cluster(ClusterConfig(), 1):
        started = psutil.Process().children(recursive=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except KeyboardInterrupt:
    _, alive = psutil.wait_procs(started, timeout=20)
    print("interrupted; left:", [p.name() for p in alive])
"""


@pytest.mark.parts
def test_while_engines_start_nobody_is_left_and_ray_says_nothing(tmp_path):
    """Ray's own handler would write a stack trace and abort the driver."""
    script = tmp_path / "starting.py"
    script.write_text(_STARTING)
    done = programs.run([sys.executable, script])
    assert done.stdout == "interrupted; left: []\n", done.stderr[-2000:]
    assert done.returncode == 0
    assert "SIGTERM received" not in done.stderr
