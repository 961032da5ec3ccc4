"""Jobs of supervised runs: a file with a table [sft]."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from stare_megatron import config
from stare_megatron.__main__ import _parser, main
from stare_megatron.launch import drain, job, k8s, node, slurm
from stare_megatron.launch.job import Job, Nodes, folders, named_paths
from tests.configs import small_model
from tests.shellcheck import complaints
from tests.unit.launch.kuberay import RayJob
from tests.unit.launch.test_command import program

SFT = """
[run]
name = "cold"
dir = "{folder}/runs"
[model]
path = "{folder}/models/m"
[data]
train = ["{folder}/data/train.jsonl"]
eval = ["{folder}/held/out.jsonl"]
[sft]
max_tokens = 64
[trainer]
world_size = 16
tensor_parallel = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "sft.toml").write_text(SFT.format(folder=tmp_path))
    return tmp_path / "sft.toml"


@pytest.fixture
def ready(file: Path, tmp_path: Path) -> Path:
    """One whose files are there."""
    (tmp_path / "models").mkdir()
    small_model(tmp_path / "models/m")
    for name in ("data/train.jsonl", "held/out.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"prompt": "1 + 1 =", "completion": "2"}\n')
    return file


def job_of(file: Path, target: str, *words: str) -> Job:
    return job.of(_parser().parse_args(["launch", target, str(file), *words]), [])


@pytest.mark.parametrize(
    ("words", "nodes"),
    [
        ([], Nodes(2, 8, 0)),
        (["trainer.world_size=4"], Nodes(1, 4, 32)),
        (["--gpus-per-node=0"], Nodes(1, 0, 17)),
    ],
)
def test_nodes_are_those_of_the_ranks(file: Path, words: list[str], nodes: Nodes) -> None:
    made = job_of(file, "slurm", *words)
    assert (made.main, made.extra) == (nodes, None)


def test_settings_and_paths_are_the_run_s_own(file: Path, tmp_path: Path) -> None:
    made = job_of(file, "slurm", "sft.epochs=3", "run.steps=0")
    assert config.parse_sft(tomllib.loads(made.settings), "job") == made.written
    assert made.written == config.load_sft(file, ["sft.epochs=3", "cluster.address=auto"])
    assert {key for key, _ in named_paths(made.written)} == {"run.dir", "model.path", "data.train", "data.eval"}
    assert tmp_path / "held" in folders(made)


def test_slurm_runs_sft_on_the_first_node(file: Path, tmp_path: Path) -> None:
    script = slurm.render(job_of(file, "slurm"), slurm.Options(container="image"))
    (task,) = (line for line in script.splitlines() if line.startswith("srun "))
    assert " --command=sft " in task
    assert "#SBATCH --requeue" in script
    assert f"cat {tmp_path}/runs/cold/checkpoints/latest" in script
    (tmp_path / "job.sbatch").write_text(script)
    assert complaints(tmp_path / "job.sbatch") == ""


def test_the_first_node_s_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray: Any = None  # is handed on alone
    words = ["sft.toml", "--head=h", "--state", str(tmp_path), "--command=sft"]
    mine, called = node.Node(node._part(words)), []
    monkeypatch.setattr(mine, "_until_answers", lambda target: True)
    monkeypatch.setattr(mine, "_call", lambda command, ray: called.append(command))
    assert mine._lead(ray, "h:1") == 0
    assert called[1][1:] == ["-m", "stare_megatron", "doctor", "sft.toml", "cluster.address=h:1"]
    assert called[2][1:4] == ["-m", "stare_megatron", "sft"]
    assert called[2][4:] == ["sft.toml", "cluster.address=h:1", "run.resume=auto", "--quiet"]


def test_the_ray_job_is_one_of_kuberay(file: Path) -> None:
    made = job_of(file, "k8s")
    settings, ray_job = yaml.safe_load_all(k8s.render(made, k8s.Options("image", {})))
    assert config.parse_sft(tomllib.loads(settings["data"]["run.toml"]), "job") == made.written
    assert RayJob.model_validate(ray_job).spec.entrypoint.split()[:3] == ["exec", "stare-megatron", "sft"]


@pytest.mark.parametrize("target", ["ray-job", "local"])
def test_a_dry_run_shows_the_command(file: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert main(["launch", target, str(file), "trainer.world_size=4", "--dry-run"]) == 0
    command = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert " sft " in command
    assert "run.resume=auto" in command


def test_this_machine_runs_sft(ready: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "python", f'echo "$*" > {tmp_path}/sent', monkeypatch)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python"))
    assert main(["launch", "local", str(ready), "trainer.tensor_parallel=1", "trainer.world_size=1"]) == 0
    deadline = time.monotonic() + 300
    while not (tmp_path / "sent").exists() or not (tmp_path / "sent").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "sent").read_text().startswith("-m stare_megatron sft ")


@pytest.mark.parametrize("container", [[], ["--container=image"]])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.eval=nowhere.jsonl"], "data.eval: "),
        (["sft.max_tokens=99999"], "sft.max_tokens = 99999"),
        (["trainer.tensor_parallel=8"], "trainer.tensor_parallel"),
    ],
)
def test_what_sft_would_refuse_is_not_submitted(
    ready: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str,
    container: list[str],
) -> None:  # fmt: skip
    program(tmp_path, "sbatch", f"touch {tmp_path}/sent", monkeypatch)
    assert main(["launch", "slurm", str(ready), *words, *container]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "sent").exists()


def test_before_a_pod_ends_its_sft_is_found(tmp_path: Path) -> None:
    folder = tmp_path / f"run-{os.getpid()}"
    folder.mkdir()
    (folder / "stare-megatron").write_text("import time; time.sleep(900)")
    run = subprocess.Popen([sys.executable, str(folder / "stare-megatron"), "sft", "sft.toml"])
    try:
        assert run.pid in [p.pid for p in drain.drivers()]  # and runs of other tests, if there are any
    finally:
        run.kill()
        run.wait()


def test_the_doctor_reads_such_a_file(file: Path) -> None:
    from stare_megatron.doctor import command

    found, cluster = command._read([str(file), "cluster.address=HOST:1"])
    assert found is not None
    assert (found.inference.engines, found.trainer.world_size, cluster.address) == (0, 16, "HOST:1")
