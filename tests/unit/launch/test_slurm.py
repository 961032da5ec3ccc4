"""The batch script: what it asks for, and what it does when it is told to stop. Programs of Slurm are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from stare_megatron.errors import UserError
from stare_megatron.launch.slurm import Options, render
from tests.shellcheck import complaints
from tests.unit.launch.cases import MARKED, job_of

SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf 'n1\\nn2\\n' ;;
    "show job") echo "JobId=$3 JobState=$STATE Reason=None" ;;
    requeue*) echo "$2" >> "$SAID" ;;
esac
"""
# A run that ends with $CODE, once it is told to stop if that is 130.
SRUN = """#!/usr/bin/env bash
for word; do case $word in --state=*) state=${word#--state=};; esac; done
printf '%s\\n' "$*" >> "$SAID"
if [[ $CODE == 130 ]]; then until [[ -f $state/stop ]]; do sleep 0.05; done; fi
if [[ -n ${SAVES:-} ]]; then mkdir -p "$SAVES"; echo step_000004 > "$SAVES/latest"; fi
[[ $CODE == none ]] || echo "$CODE" > "$state/code"
exit 1
"""


def sbatch(script: str) -> dict[str, str]:
    """The options in the script's head, by name."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def start(tmp_path: Path, script: str, code: str, state: str = "RUNNING") -> subprocess.Popen[str]:
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "64"}
    own = {"PATH": f"{fakes}:{os.environ['PATH']}", "CODE": code, "STATE": state, "SAID": str(tmp_path / "said")}
    return subprocess.Popen(["bash", str(file)], env=os.environ | slurm | own, text=True)


def test_the_head_asks_for_the_layout(tmp_path: Path) -> None:
    asked = sbatch(render(job_of(tmp_path, "slurm"), Options(time="1-0", sbatch=("--partition=gpu",))))
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("2", "8", "1")
    assert asked["signal"] == "B:TERM@600"
    assert {"requeue", "exclusive"} <= asked.keys()
    assert (asked["time"], asked["partition"]) == ("1-0", "gpu")


def test_part_of_a_node_is_not_exclusive(tmp_path: Path) -> None:
    asked = sbatch(render(job_of(tmp_path, "slurm", "trainer.world_size=4", "inference.engines=4"), Options()))
    assert "exclusive" not in asked
    assert (asked["gpus-per-node"], asked["cpus-per-task"]) == ("4", "32")


def test_nodes_of_the_sandbox_are_a_part_of_their_own(tmp_path: Path) -> None:
    script = render(job_of(tmp_path, "slurm", *MARKED), Options(sbatch=("--qos=a",), sandbox=("--partition=cpu",)))
    main, extra = script.split("#SBATCH hetjob")
    assert "--qos=a" in main
    assert sbatch(extra) == {"nodes": "4", "ntasks-per-node": "1", "cpus-per-task": "16", "partition": "cpu"}
    first, second = (line for line in script.splitlines() if line.startswith("srun "))
    assert "--het-group=0" in first
    assert "--nodes=6 --gpus=8" in first
    assert "--het-group=1" in second
    assert "--first-rank=2 '--resources={\"sandbox\": 1}'" in second


def test_containers_see_the_run_s_folders(tmp_path: Path) -> None:
    job = job_of(tmp_path, "slurm")
    seen = [f"{tmp_path}/data", f"{tmp_path}/models/m", f"{tmp_path}/runs", f"{tmp_path}/runs-launch/Launched_1"]
    script = render(job, Options(container="a.sqsh", mounts=("/data:/d",)))
    mounts = script.partition("--container-mounts=")[2].split()[0].split(",")
    assert sorted(mounts) == sorted([*(f"{folder}:{folder}" for folder in seen), "/data:/d"])
    assert " /opt/venv/bin/python -m stare_megatron.launch.node " in script
    script = render(job, Options(container="a.sif", runtime="apptainer"))
    bound = script.partition("apptainer exec --nv --bind ")[2].split()
    assert sorted(bound[0].split(",")) == sorted(seen)
    assert bound[1] == "a.sif"


@pytest.mark.parametrize("option", ["-p gpu", "--nodes=3", "--signal=USR1", "--comment=a\nb"])
def test_an_option_that_is_the_layout_s_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match="--sbatch="):
        render(job_of(tmp_path, "slurm"), Options(sbatch=(option,)))


def test_a_folder_that_a_script_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rename it"):
        render(job_of(tmp_path, "slurm", f"--folder={tmp_path}/a b"), Options())


@pytest.mark.parametrize(("code", "ends"), [("0", 0), ("2", 2), ("none", 1)])
def test_the_job_ends_as_the_run_does(tmp_path: Path, code: str, ends: int) -> None:
    process = start(tmp_path, render(job_of(tmp_path, "slurm"), Options()), code)
    assert process.wait(timeout=300) == ends
    assert (tmp_path / "said").read_text().count("\n") == 1  # srun alone
    assert "--head=n1 --state=" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("CANCELLED", False), ("COMPLETING", False)])
def test_a_job_that_is_told_to_stop_is_queued_again(tmp_path: Path, state: str, again: bool) -> None:
    process = start(tmp_path, render(job_of(tmp_path, "slurm"), Options()), "130", state)
    deadline = time.monotonic() + 300
    while not (tmp_path / "said").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 130
    assert (tmp_path / "said").read_text().splitlines()[1:] == (["7"] if again else [])


@pytest.mark.parametrize("further", [True, False])
def test_a_job_that_lost_a_process_is_queued_again_if_it_came_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: bool
) -> None:
    job = job_of(tmp_path, "slurm")
    saves = job.config.folder / "checkpoints"
    saves.mkdir(parents=True)
    (saves / "latest").write_text("step_000002\n")
    monkeypatch.setenv("SAVES", str(saves) if further else "")
    assert start(tmp_path, render(job, Options()), "75").wait(timeout=300) == 75
    assert (tmp_path / "said").read_text().splitlines()[1:] == (["7"] if further else [])


@pytest.mark.parametrize("words", [[], MARKED])
def test_shellcheck_takes_it(tmp_path: Path, words: list[str]) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(render(job_of(tmp_path, "slurm", *words), Options(container="a", mounts=("/b",))))
    assert complaints(script) == ""
