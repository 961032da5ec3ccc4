"""`stare-megatron doctor` with real Ray: of this machine's own, and a cluster of three nodes that are all here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from stare_megatron.host.ports import free_port
from tests import programs
from tests.contracts.source import ROOT

AUTH = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}

# Python runs it first.
WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stare_megatron":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Without())
"""


def call(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of the doctor, as a user calls it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "GLOO_", "NCCL_"))}
    command = [sys.executable, "-m", "stare_megatron", "doctor", *arguments]
    env = kept | AUTH | {"COLUMNS": "200"} | environment
    done = programs.run(command, env=env, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = tmp_path / "run.toml"
    file.write_text(
        f'[run]\nsteps = 1\ndir = "{tmp_path / "runs"}"\n[model]\npath = "{model}"\n[data]\ntrain = ["a.jsonl"]\n'
        '[reward]\nname = "math"\n[trainer]\nworld_size = 2\n'
    )
    return file


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three nodes. The second was started with an interface that is not there, the third has not this package."""
    lacking = tmp_path_factory.mktemp("lacking") / "sitecustomize.py"
    lacking.write_text(WITHOUT)
    before = dict(os.environ)
    os.environ.update(AUTH)
    try:
        port = free_port()
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "gcs_server_port": port})
        os.environ["GLOO_SOCKET_IFNAME"] = "nonesuch0"
        made.add_node(num_cpus=1)
        del os.environ["GLOO_SOCKET_IFNAME"]
        os.environ["PYTHONPATH"] = str(lacking.parent)
        made.add_node(num_cpus=1)
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield made.address
    made.shutdown()


def test_one_machine(run):
    code, said = call(str(run))
    assert code == 0, said
    lines = said.splitlines()
    assert lines[0].startswith("Python 3.")
    assert lines[1].split()[:2] == ["node", "address"]
    # What this machine may lack is told as warnings.
    assert all(line.lstrip().startswith(("warning", "no problems")) for line in lines[3:]), said
    assert not (run.parent / "runs").exists()


def test_nodes_that_were_started_otherwise(cluster, run):
    code, said = call(str(run), f"cluster.address={cluster}", "model.path=/nowhere", NCCL_DEBUG="WARN")
    assert code == 1, said
    problems = [line for line in said.splitlines() if line.startswith(" problem")]
    assert len(problems) == 4, said
    assert "runs nothing of ours: ModuleNotFoundError: No module named 'stare_megatron'; install the driver's" in said
    assert "model.path = /nowhere is not there" in said
    assert "GLOO_SOCKET_IFNAME = nonesuch0 names no interface there" in said
    assert "the run needs 3 CPUs; the cluster has 2, 2 of them free" in said
    assert "NCCL_DEBUG: WARN for the driver, not set on any node" in said


def test_a_cluster_that_answers_no_more(run):
    code, said = call(f"cluster.address=127.0.0.1:{free_port()}")
    assert code == 1
    assert "(Connection refused); start Ray there" in said
