"""`stare-megatron launch`: render a run's job, and submit it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.launch import check, k8s, slurm
from stare_megatron.launch import job as jobs
from stare_megatron.launch.job import Job

_FEW = 3


def run(args: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Launch, or with `--dry-run` render alone; returns what is to be printed.

    Raises:
        UserError: settings or options are refused, or the program that submits says no.
    """
    job = jobs.of(args, overrides)
    return {"slurm": _slurm, "k8s": _k8s, "ray-job": _ray_job, "local": _local}[args.target](job, args)


def _slurm(job: Job, args: argparse.Namespace) -> str:
    options = slurm.Options(
        time=args.time,
        sbatch=tuple(args.sbatch),
        sandbox=tuple(args.sandbox_sbatch),
        container=args.container,
        runtime=args.runtime,
        mounts=tuple(args.mount),
        python=args.python,
        port=args.port,
    )
    script = slurm.render(job, options)
    if args.dry_run:
        return script
    logs = _logs(job)
    notes = check.check(job, container=bool(options.container))
    _write({job.folder / slurm.SCRIPT: script, job.run_file: job.settings})
    said = _submit(["sbatch", str(job.folder / slurm.SCRIPT)], "sbatch must be here and take the job: see --dry-run")
    return "\n".join([*(f"note: {note}" for note in notes), said, f"logs       {logs}/JOB-START/HOST.log"])


def _k8s(job: Job, args: argparse.Namespace) -> str:
    if not args.image:
        raise UserError("--image: name the image that the pods run; tools/docker has its Dockerfiles")
    claims = k8s.claims_of(args.claim)
    check.check_seen(job, claims)
    options = k8s.Options(args.image, claims, args.namespace, args.memory, args.shm, args.retries)
    manifest = k8s.render(job, options)
    if args.dry_run:
        return manifest
    if shutil.which("kubectl") is None:
        raise UserError("kubectl is not on PATH: run it where it is, or see --dry-run")
    done = subprocess.run(["kubectl", "create", "-f", "-"], input=manifest, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"kubectl create: {_why(done.stderr)}")
    return f"{done.stdout.strip()}\nlogs       kubectl logs -f -l job-name={k8s.name_of(job.name)}"


def _ray_job(job: Job, args: argparse.Namespace) -> str:
    """Its files go along, since the cluster's head may not see this machine's."""
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "job",
        "submit",
        "--no-wait",
        *(["--address", args.address] if args.address else []),
    ]
    command += ["--working-dir", str(job.run_file.parent)]
    if job.environment:
        command += ["--runtime-env-json", json.dumps({"env_vars": dict(job.environment)})]
    command += ["--", *job.entrypoint(job.run_file.name)]
    if args.dry_run:
        return f"# {job.run_file}\n{job.settings}\n# command\n{shlex.join(command)}"
    _write({job.run_file: job.settings})
    cure = "--address must be a cluster's dashboard, and the extra `cluster` is needed there and here"
    return _submit(command, cure)


def _local(job: Job, args: argparse.Namespace) -> str:
    if job.main.count > 1:
        raise UserError(f"the run's layout takes {job.main.count} nodes; launch it on a cluster, or change the layout")
    command = [sys.executable, "-m", "stare_megatron", job.command, str(job.run_file), "run.resume=auto", "--quiet"]
    if args.dry_run:
        return f"# {job.run_file}\n{job.settings}\n# command\n{shlex.join(command)}"
    notes = check.check(job, container=False)
    _write({job.run_file: job.settings})
    log = _logs(job) / f"{datetime.datetime.now():%Y%m%d-%H%M%S}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a closed terminal does not end it
            env=os.environ | job.environment,
        )
    lines = [f"started    process {process.pid}", f"log        {log}", f"stop       kill {process.pid}"]
    return "\n".join([*(f"note: {note}" for note in notes), *lines])


def _logs(job: Job) -> Path:
    """Slurm and this machine write there before anything of ours runs."""
    folder = job.folder / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--folder: cannot make {folder}: {e.strerror}") from e
    return folder


def _write(files: Mapping[Path, str]) -> None:
    for file, text in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        except OSError as e:
            raise UserError(f"--folder: cannot write {file}: {e.strerror}") from e


def _submit(command: Sequence[str], cure: str) -> str:
    """What the program says. Raises: UserError: it is not there, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise UserError(f"{command[0]}: {e.strerror}; {cure}") from e
    if done.returncode:
        raise UserError(f"{Path(command[0]).name}: {_why(done.stderr or done.stdout)}; {cure}")
    return done.stdout.strip()


def _why(said: str) -> str:
    """In one line: the few that a program says, or the last of a traceback."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return " / ".join(lines if len(lines) <= _FEW else lines[-1:]) or "it says nothing"
