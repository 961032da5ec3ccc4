"""What a whole run does when its tools die: a node of the pool that is lost, and an actor that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from stare_megatron.metrics import jsonl
from tests.contracts.source import ROOT
from tests.e2e.tool_run import command, make_material

STEPS = 24

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Raylets of this machine as nodes: the head has the processors, no other node may run ranks or engines."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "object_store_memory": 256 << 20, "include_dashboard": False},
    )
    try:
        yield made
    finally:
        made.shutdown()


def add_tool_node(made: Cluster) -> Any:
    return made.add_node(num_cpus=0, resources={"tool_node": 1}, object_store_memory=128 << 20)


def raylet(node: Any) -> int:
    """Its process."""
    return node.all_processes["raylet"][0].process.pid


class Run:
    """A training run as a process, watched through its metrics."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder / "tool"
        settings: dict[str, object] = {
            "cluster.address": address,
            "sandbox.actors": 2,
            "sandbox.actor_cpus": 0,
            "sandbox.node_resource": "tool_node",
            "sandbox.health_seconds": 5,
            "sandbox.queue_seconds": 30,
            "sandbox.wall_seconds": 5,
        }
        self._process = subprocess.Popen(
            command(make_material(folder / "material"), folder, steps=STEPS, **settings),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def rows(self) -> list[dict[str, Any]]:
        path = self._folder / "metrics.jsonl"
        return jsonl.read(path) if path.exists() else []

    def log(self) -> str:
        return "".join(path.read_text() for path in self._folder.glob("logs/engine*.log"))

    def wait_for(self, what: Callable[[], bool], seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self._process.poll() is None, self._said()
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: len(self.rows()) >= step)

    def finish(self) -> None:
        assert self._process.wait(300) == 0, self._said()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.read()[-3000:]


def sandbox_processes() -> dict[int, int]:
    """Process of each sandbox actor, by that of its node's raylet."""
    found = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if any("ray::SandboxActor" in part for part in process.info["cmdline"] or ()):
            found[process.info["ppid"]] = process.pid
    return found


def test_tools_that_die_cost_their_own_episodes(tmp_path):
    """One of the pool's two nodes is lost in step 4 or 5, and an actor on the other hangs in step 10 or later: the run
    goes on to its end, no step waits longer than the limits say, and once all is well again no episode fails."""
    with cluster() as nodes:
        lost, stays = add_tool_node(nodes), add_tool_node(nodes)
        with closing(Run(tmp_path, nodes.address)) as run:
            run.wait_for_step(3)
            by_node = sandbox_processes()
            assert len(by_node) == 2, "one actor on each node of the pool"
            hangs = by_node[raylet(stays)]
            nodes.remove_node(lost, allow_graceful=False)
            run.wait_for(lambda: run.log().count("answers again") == 1)
            run.wait_for_step(max(9, len(run.rows()) + 1))
            os.kill(hangs, signal.SIGSTOP)
            run.wait_for(lambda: run.log().count("answers again") == 2)
            assert "it is replaced" in run.log()
            assert not psutil.pid_exists(hangs)
            well = len(run.rows()) + 1
            run.finish()
            rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    failed = [int(row["response/failed"]) for row in rows]
    seconds = [round(row["time/rollout"], 1) for row in rows]
    print("failed:", failed, "\nseconds of the rollout:", seconds)
    sampled = 20 * 8
    assert all(n < sampled for n in failed)
    assert failed[:3] == [0, 0, 0]
    # A call's limit: two waits for a turn, its wall-clock time, the way there and back.
    usual = sorted(seconds)[len(seconds) // 2]
    assert max(seconds) < 3 * usual + (2 * 30 + 5 + 10)
    assert len(rows) > well
    assert set(failed[well:]) == {0}
