"""A job's nodes, folders and settings."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from stare_megatron import config
from stare_megatron.errors import UserError
from stare_megatron.launch.job import Nodes, folders
from tests.unit.launch.cases import MARKED, TOOL, job_of


@pytest.mark.parametrize(
    ("words", "main"),
    [
        ([], Nodes(2, 8, 0)),
        (["--gpus-per-node=4"], Nodes(4, 4, 0)),
        (["--nodes=3", "--cpus-per-node=96"], Nodes(3, 8, 96)),
        (["inference.placement=separate"], Nodes(4, 8, 0)),
        # Part of a node, which others may share.
        (["trainer.world_size=4", "inference.engines=4"], Nodes(1, 4, 32)),
        (["trainer.world_size=8", "inference.engines=4"], Nodes(1, 8, 0)),
        (["--gpus-per-node=0"], Nodes(1, 0, 33)),
        (["--gpus-per-node=0", "--cpus-per-node=8"], Nodes(4, 0, 8)),
        # The sandbox's actors beside ranks and engines.
        ([*TOOL, "--cpus-per-node=32"], Nodes(3, 8, 32)),
    ],
)
def test_nodes_follow_from_the_layout(tmp_path: Path, words: list[str], main: Nodes) -> None:
    made = job_of(tmp_path, "slurm", *words)
    assert (made.main, made.extra) == (main, None)


def test_a_sandbox_that_asks_for_its_own_nodes_gets_them(tmp_path: Path) -> None:
    made = job_of(tmp_path, "slurm", *MARKED)
    assert (made.main, made.extra) == (Nodes(2, 8, 0), Nodes(4, 0, 16, "sandbox"))
    assert job_of(tmp_path, "slurm", *MARKED, "--sandbox-nodes=2").extra == Nodes(2, 0, 32, "sandbox")
    shared = job_of(tmp_path, "slurm", *MARKED, "--sandbox-nodes=0")
    assert (shared.main, shared.extra) == (Nodes(2, 8, 0, "sandbox"), None)


def test_a_job_s_settings_are_those_of_the_run_on_a_cluster(tmp_path: Path) -> None:
    made = job_of(tmp_path, "slurm", "run.steps=9", "--env=A=b=c")
    assert config.parse(tomllib.loads(made.settings), "job") == made.config
    assert (made.config.run.steps, made.config.cluster.address) == (9, "auto")
    assert made.environment == {"A": "b=c"}
    assert made.folder == tmp_path / "runs-launch/Launched_1"


def test_folders_hold_everything_once(tmp_path: Path) -> None:
    assert folders(job_of(tmp_path, "slurm", "model.path=/models/m", f"--folder={tmp_path}/runs/x")) == [
        Path("/models/m"),
        tmp_path / "data",
        tmp_path / "runs",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes=1"], "--nodes 1: the run's layout takes 2"),
        (["trainer.tensor_parallel=8", "--gpus-per-node=4"], "trainer.tensor_parallel = 8 does not divide"),
        (["trainer.world_size=18", "trainer.tensor_parallel=3"], "trainer.tensor_parallel = 3 does not divide"),
        (["run.resume=/some/checkpoint"], "run.resume = '/some/checkpoint': a job goes on from its own"),
        (["--env=x"], "--env x: want NAME=VALUE"),
        (["--grace=-1"], "are not below 0"),
        (["trainer.world_size=0"], "command line: trainer.world_size = 0"),
    ],
)
def test_what_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        job_of(tmp_path, "slurm", *words)
    assert said in str(refused.value)


def test_this_machine_is_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cluster\.address = 'auto': `launch local` starts Ray"):
        job_of(tmp_path, "local", "cluster.address=auto")
