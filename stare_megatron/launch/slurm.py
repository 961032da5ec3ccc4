"""A batch script for Slurm: a task on each node that starts Ray there, and on the first one the run.

The script asks Slurm for SIGTERM some minutes before its time limit. It then leaves a file for the first task, which
has the run end its step and save (srun itself kills its tasks when it hears SIGTERM, and Ray's processes with them),
and has Slurm queue the job again. It does not where Slurm no longer calls the job running: `scancel` ends it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.launch.job import Job, Nodes, folders
from stare_megatron.run.folder import CHECKPOINTS

SCRIPT = "job.sbatch"
IMAGE_PYTHON = "/opt/venv/bin/python"  # of tools/docker
_BEGIN = """set -euo pipefail

folder={folder}
state=$folder/logs/$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}   # of this start: a log a node, Ray's own logs
mkdir -p "$state"
saved() {{ cat {checkpoints}/latest 2>/dev/null || true; }}
before=$(saved)
mapfile -t hosts < <(scontrol show hostnames "${{SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}}")
# Ray takes no one in who does not know it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
"""
_END = """
trap 'touch "$state/stop"' TERM
for step in "${steps[@]}"; do
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
done

code=1
if [[ -f $state/code ]]; then code=$(<"$state/code"); fi
# 130: it was told to stop, and has saved. 75: it has lost a process; worth another start if this one came further.
if [[ $code == 130 || ($code == 75 && $(saved) != "$before") ]]; then again=yes; fi
if [[ -n ${again:-} && $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Options:
    """`sbatch`: further options of the job, `sandbox`: of the part with the sandbox's nodes; `mounts`: of a container,
    beside the run's own folders; `python`: "": this one, in a container its image's."""

    time: str = ""
    sbatch: tuple[str, ...] = ()
    sandbox: tuple[str, ...] = ()
    container: str = ""
    runtime: str = "pyxis"
    mounts: tuple[str, ...] = ()
    python: str = ""
    port: int = 6379

    @property
    def interpreter(self) -> str:
        return self.python or (IMAGE_PYTHON if self.container else sys.executable)


def render(job: Job, options: Options) -> str:
    """The batch script.

    Raises:
        UserError: an option of sbatch that the layout decides, or a path that the script cannot hold.
    """
    lines = ["#!/usr/bin/env bash", "# Written by `stare-megatron launch slurm`."]
    for number, nodes in enumerate(job.groups):
        lines += ["#SBATCH hetjob"] if number else []
        lines += [f"#SBATCH {option}" for option in _options(job, nodes, options, first=not number)]
    lines += [_BEGIN.format(folder=_plain(job.folder), checkpoints=_plain(job.config.folder / CHECKPOINTS))]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    lines += ["steps=()"]
    for number, nodes in enumerate(job.groups):
        lines += [_step(job, nodes, options, number), "steps+=($!)"]
    return "\n".join(lines) + "\n" + _END


def _options(job: Job, nodes: Nodes, options: Options, *, first: bool) -> Iterator[str]:
    yield f"--nodes={nodes.count}"
    yield "--ntasks-per-node=1"
    if nodes.gpus:
        yield f"--gpus-per-node={nodes.gpus}"
    if nodes.cpus:
        yield f"--cpus-per-task={nodes.cpus}"
    else:
        yield from ("--exclusive", "--mem=0")
    if first:
        yield f"--job-name={job.name}"
        yield f"--output={_plain(job.folder)}/logs/%j.log"
        yield "--open-mode=append"
        yield "--requeue"
        yield f"--signal=B:TERM@{job.grace}"
    if options.time:
        yield f"--time={options.time}"
    for option in options.sbatch if first else options.sandbox:
        name = option.partition("=")[0]
        if not option.startswith("--") or name in _OURS or "\n" in option:
            raise UserError(f"--sbatch={option}: want --NAME=VALUE, and none of {', '.join(sorted(_OURS))}")
        yield option


_OURS = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--output", "--open-mode", "--requeue", "--signal"}


def _step(job: Job, nodes: Nodes, options: Options, group: int) -> str:
    """The task of each node of a group, in the background."""
    srun = ["srun", f"--nodes={nodes.count}", f"--ntasks={nodes.count}", "--kill-on-bad-exit=0"]
    # A step gets one CPU unless it asks, and is bound to it.
    cpus = str(nodes.cpus) if nodes.cpus else '"$SLURM_CPUS_ON_NODE"'
    srun += ["--cpu-bind=none", f"--cpus-per-task={cpus}"]
    srun += [f"--het-group={group}"] if job.extra else []
    inside, mounts = [], [*map(_plain, folders(job)), *options.mounts]
    if options.container and options.runtime == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        srun += [f"--container-image={options.container}", f"--container-mounts={pairs}"]
    elif options.container:
        gpus = ["--nv"] if nodes.gpus else []
        inside = ["apptainer", "exec", *gpus, "--bind", ",".join(mounts), options.container]
    task = [*inside, options.interpreter, "-m", "stare_megatron.launch.node"]
    task += [f"--port={options.port}", f"--nodes={sum(n.count for n in job.groups)}", f"--gpus={nodes.gpus}"]
    task += [f"--cpus={nodes.cpus}", f"--first-rank={0 if not group else job.main.count}"]
    task += [f"--resources={json.dumps({nodes.resource: 1})}"] if nodes.resource else []
    task += [f"--command={job.command}"] if job.command != "train" else []
    task += ['--head="${hosts[0]}"', '--state="$state"', str(job.run_file)]
    return _command([*srun, '--output="$state/%N.log"', *task])


def _command(words: Sequence[str]) -> str:
    """Quoted for bash, but for our own variables."""
    quoted = [word if '"$' in word else shlex.quote(word) for word in words]
    return " ".join(quoted) + " &"


def _plain(path: Path) -> str:
    """Raises: UserError: characters that #SBATCH lines, mounts or log patterns would read otherwise."""
    if odd := set(str(path)) & set(" \t\"'\\%,:$`#"):
        raise UserError(f"{str(path)!r}: has {sorted(odd)} in its name, which a batch script cannot hold; rename it")
    return str(path)
