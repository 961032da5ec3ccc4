"""Slurm's programs, as far as a batch script of ours needs them, on `machines`: sbatch, srun, scontrol.

`install` puts them into a folder for PATH. This file is what they run: a job's script runs on the box, again and again
while it is queued again, and srun's tasks run on the machines, in their order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

JOB = "7"


def install(folder: Path, nodes: Sequence[tuple[str, int]]) -> Path:
    """`nodes`: names and first processes. Returns the folder for PATH."""
    folder.mkdir()
    (folder / "nodes.json").write_text(json.dumps(nodes))
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} {name} "$@"\n')
        program.chmod(0o755)
    return folder / "bin"


def sbatch(folder: Path, script: str) -> None:
    """Leave the job to a process of its own."""
    with Path(os.devnull).open("r+") as nothing:  # whoever reads our words does not wait for the job
        subprocess.Popen(
            [sys.executable, __file__, str(folder), "job", script],
            start_new_session=True,
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
        )
    sys.stdout.write(f"Submitted batch job {JOB}\n")


def job(folder: Path, script: str) -> None:
    """Run the script until it is not queued again; its exit code is left in `ended`."""
    output = next(line for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH --output="))
    log = Path(output.partition("=")[2].replace("%j", JOB))
    names = [name for name, _ in json.loads((folder / "nodes.json").read_text())]
    count = 0
    while True:
        environment = os.environ | {
            "SLURM_JOB_ID": JOB,
            "SLURM_RESTART_COUNT": str(count),
            "SLURM_JOB_NODELIST": ",".join(names),
            "SLURM_CPUS_ON_NODE": "4",
        }
        with log.open("a") as said:
            process = subprocess.Popen(["bash", script], env=environment, stdout=said, stderr=subprocess.STDOUT)
        (folder / "pid").write_text(str(process.pid))
        code = process.wait()
        if not (folder / "requeue").exists():
            break
        (folder / "requeue").unlink()
        count += 1
    (folder / "ended").write_text(f"{code} after {count}")


def scontrol(folder: Path, *words: str) -> None:
    match words:
        case ("show", "hostnames", names):
            sys.stdout.write(names.replace(",", "\n") + "\n")
        case ("show", "job", number):
            sys.stdout.write(f"JobId={number} JobState=RUNNING\n")
        case ("requeue", _):
            (folder / "requeue").touch()


def srun(folder: Path, *words: str) -> None:
    """A task a machine; ends with the largest of their codes."""
    at = next(n for n, word in enumerate(words) if not word.startswith("--"))
    options = dict(word.removeprefix("--").split("=", 1) for word in words[:at])
    tasks = []
    for number, (name, pid) in enumerate(json.loads((folder / "nodes.json").read_text())[: int(options["ntasks"])]):
        inside = ["nsenter", "-t", str(pid), "-m", "-u", "-n", "-i", "-p", "--", "env", f"SLURM_PROCID={number}"]
        with Path(options["output"].replace("%N", name)).open("w") as said:
            tasks.append(subprocess.Popen([*inside, *words[at:]], cwd="/", stdout=said, stderr=subprocess.STDOUT))
    sys.exit(max(task.wait() for task in tasks))


def wait_for(file: Path, seconds: float) -> str:
    """Its text, once it is there."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file} within {seconds:.0f} s"
        time.sleep(0.2)
    return file.read_text()


if __name__ == "__main__":
    {"sbatch": sbatch, "job": job, "srun": srun, "scontrol": scontrol}[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
