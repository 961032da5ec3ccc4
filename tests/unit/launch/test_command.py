"""The command: what it writes, submits and says."""

from __future__ import annotations

import os
import signal
import subprocess
import tomllib
from pathlib import Path

import psutil
import pytest

from stare_megatron import config
from stare_megatron.__main__ import main
from tests.configs import small_model
from tests.unit.launch.cases import write

SMALL = ["trainer.tensor_parallel=1", "trainer.world_size=1", "inference.engines=1"]


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A run whose files are there."""
    file = write(tmp_path)
    (tmp_path / "models").mkdir()
    small_model(tmp_path / "models/m")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    return file


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program on PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("target", ["slurm", "ray-job", "k8s"])
def test_a_dry_run_writes_nothing(tmp_path, capsys, target):
    """And needs neither data nor model."""
    words = ["--image=i", f"--claim=shared:{tmp_path}"] if target == "k8s" else []
    assert main(["launch", target, str(write(tmp_path)), "--dry-run", *words]) == 0
    assert "stare-megatron train" in capsys.readouterr().out.replace("launch.node", "stare-megatron train")
    assert [file.name for file in tmp_path.iterdir()] == ["run.toml"]


def test_slurm_gets_the_script_and_the_settings(ready, tmp_path, capsys, monkeypatch):
    program(tmp_path, "sbatch", f'bash -n "$1" && cp "$1" {tmp_path}/sent && echo Submitted batch job 7', monkeypatch)
    assert main(["launch", "slurm", str(ready), "run.steps=9"]) == 0
    said = capsys.readouterr().out
    assert "Submitted batch job 7" in said
    folder = tmp_path / "runs-launch/Launched_1"
    assert f"{folder}/logs" in said
    assert (tmp_path / "sent").read_text() == (folder / "job.sbatch").read_text()
    assert (folder / "logs").is_dir()
    made = config.load(folder / "job/run.toml", [])
    assert (made.run.steps, made.cluster.address) == (9, "auto")
    assert str(folder / "job/run.toml") in (folder / "job.sbatch").read_text()


def test_a_run_that_goes_on_is_said_to(ready, tmp_path, capsys, monkeypatch):
    program(tmp_path, "sbatch", "true", monkeypatch)
    latest = tmp_path / "runs/Launched_1/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_000003\n")
    assert main(["launch", "slurm", str(ready)]) == 0
    assert "has checkpoints: the job goes on from step_000003" in capsys.readouterr().out


def test_what_slurm_says_is_passed_on(ready, tmp_path, capsys, monkeypatch):
    program(tmp_path, "sbatch", "echo 'invalid partition specified' >&2; exit 1", monkeypatch)
    assert main(["launch", "slurm", str(ready)]) == 2
    assert "invalid partition specified" in capsys.readouterr().err


def test_without_slurm(ready, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "slurm", str(ready)]) == 2
    assert "sbatch: No such file or directory; sbatch must be here" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--container=image"]])
def test_what_a_run_would_refuse_does_not_wait_in_a_queue(ready, tmp_path, capsys, monkeypatch, words):
    program(tmp_path, "sbatch", f"touch {tmp_path}/sent", monkeypatch)
    (tmp_path / "data/train.jsonl").unlink()
    assert main(["launch", "slurm", str(ready), *words]) == 2
    assert "train.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "sent").exists()


def test_of_a_traceback_the_last_line_is_said(ready, capsys):
    """Real `ray job submit`, where no dashboard is."""
    assert main(["launch", "ray-job", str(ready), "--address=http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Failed to connect to Ray at address: http://127.0.0.1:9" in said
    assert "--address must be a cluster's dashboard" in said


def test_kubectl_gets_the_manifest(ready, tmp_path, capsys, monkeypatch):
    program(tmp_path, "kubectl", f'cat > {tmp_path}/sent; echo "rayjob.ray.io/launched-1 created"', monkeypatch)
    assert main(["launch", "k8s", str(ready), "--image=i", f"--claim=shared:{tmp_path}"]) == 0
    assert "created" in capsys.readouterr().out
    assert "kind: RayJob" in (tmp_path / "sent").read_text()
    assert main(["launch", "k8s", str(ready)]) == 2
    assert "--image" in capsys.readouterr().err


def test_a_ray_job_takes_its_settings_along(ready, tmp_path, capsys, monkeypatch):
    program(tmp_path, "python", f'printf "%s\\n" "$@" > {tmp_path}/sent; echo Submitted', monkeypatch)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python"))
    words = ["--address=http://head:8265", "--env=A=b"]
    assert main(["launch", "ray-job", str(ready), *words]) == 0
    sent = (tmp_path / "sent").read_text().splitlines()
    assert sent[:4] == ["-m", "ray.scripts.scripts", "job", "submit"]
    assert sent[sent.index("--address") + 1] == "http://head:8265"
    assert sent[sent.index("--runtime-env-json") + 1] == '{"env_vars": {"A": "b"}}'
    along = Path(sent[sent.index("--working-dir") + 1])
    train = sent[sent.index("--") + 1 :]
    assert train[:4] == ["exec", "stare-megatron", "train", "run.toml"]
    assert [file.name for file in along.iterdir()] == ["run.toml"]
    tomllib.loads((along / "run.toml").read_text())


def test_this_machine_runs_it_in_the_background(ready, tmp_path, capsys, monkeypatch):
    """In a session of its own, with its words in a log."""
    program(tmp_path, "python", f'echo "$A $*"; sleep 60 & echo $! > {tmp_path}/up; wait', monkeypatch)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python"))
    assert main(["launch", "local", str(ready), *SMALL, "--env=A=b"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] != "n")
    process = psutil.Process(int(said["started"].split()[1]))
    try:
        assert os.getsid(process.pid) == process.pid
        while not (tmp_path / "up").exists():
            pass
        log = Path(said["log"]).read_text()
        assert log.startswith("b -m stare_megatron train ")
        assert "run.resume=auto" in log
    finally:
        for each in [*process.children(), process]:
            each.send_signal(signal.SIGKILL)
        process.wait()


def test_this_machine_is_one_node(ready, capsys):
    assert main(["launch", "local", str(ready)]) == 2
    assert "takes 2 nodes" in capsys.readouterr().err


def test_a_dry_run_of_the_job_is_a_script_of_bash(tmp_path, capsys):
    assert main(["launch", "slurm", str(write(tmp_path)), "--dry-run", "--env=A=it's b"]) == 0
    script = capsys.readouterr().out
    [line] = [line for line in script.splitlines() if line.startswith("export A=")]
    done = subprocess.run(["bash", "-c", f'{line}; printf %s "$A"'], capture_output=True, text=True, check=True)
    assert done.stdout == "it's b"
