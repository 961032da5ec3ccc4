"""What runs on each node of a job: `python -m stare_megatron.launch.node`.

Every node starts Ray, the first one its head. That one waits for the others, has the doctor look at all, and runs
`train` or `sft`, whose exit code it leaves in `STATE/code`; upon that file the others end. `STATE/stop`, or SIGTERM,
has the run end its step and save. Ray's processes are deaf to SIGTERM, which Slurm sends to every process of a job,
since a run can save only while they live.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from stare_megatron.host import processes
from stare_megatron.host.ports import connect_error
from stare_megatron.launch import logs

STOPPED = 130
_POLL_S = 0.2
_START_S = 600.0
_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Part:
    """This node's part of a job: `rank` 0 has Ray's head and the run, `command` of `run_file`. `state`: a folder that
    all nodes see."""

    rank: int
    head: str
    port: int
    nodes: int
    gpus: int
    cpus: int
    resources: str
    state: Path
    run_file: Path
    command: str = "train"

    @property
    def temporary(self) -> Path:
        """Ray's folder: short, since sockets are in it, and this job's own."""
        return Path("/tmp") / f"ray-{os.getuid()}-{self.state.name}-{self.rank}"

    @property
    def code_file(self) -> Path:
        return self.state / "code"


class Node:
    """One node, from the start of its Ray to the end of the job."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._told = False
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """The exit code: the run's on the first node, 1 elsewhere if Ray ends before the job."""
        for number in _ENDS:
            signal.signal(number, self._hear)
        part = self._part
        host, port = (_own_address() or part.head, part.port) if not part.rank else (part.head, part.port)
        if part.rank and not self._until_answers((host, port)):
            return self._end(1)
        ray = _start_ray(part)
        try:
            return self._end(self._lead(ray, f"{host}:{port}") if not part.rank else self._follow(ray))
        finally:
            _kill(ray)
            logs.keep(part.temporary, part.state / f"ray-{socket.gethostname()}")
            shutil.rmtree(part.temporary, ignore_errors=True)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._part.rank:
            self._tell()

    def _tell(self) -> None:
        """Have the run stop, once."""
        if self._told:
            return
        self._told = True
        if self._driver is not None and self._driver.poll() is None:
            self._driver.send_signal(signal.SIGTERM)

    def _until_answers(self, target: tuple[str, int]) -> bool:
        deadline = time.monotonic() + _START_S
        while why := connect_error(target):
            if self._part.code_file.exists():
                return False
            if time.monotonic() > deadline:
                _say(f"no Ray at {target[0]}:{target[1]} within {_START_S:.0f} s ({why})")
                return False
            time.sleep(1)
        return True

    def _lead(self, ray: subprocess.Popen[bytes], address: str) -> int:
        """Wait for all nodes, check them, run."""
        if not self._until_answers((address.rpartition(":")[0], self._part.port)):
            return 1
        python, nodes = sys.executable, str(self._part.nodes)
        cluster = f"cluster.address={address}"
        run = [str(self._part.run_file), cluster, "run.resume=auto", "--quiet"]
        commands = (
            [python, "-m", "stare_megatron.cluster.joined", address, nodes, f"{_START_S:.0f}"],
            [python, "-m", "stare_megatron", "doctor", str(self._part.run_file), cluster],
            [python, "-m", "stare_megatron", self._part.command, *run],
        )
        for command in commands:
            if code := self._call(command, ray):
                return code
        return 0

    def _call(self, command: Sequence[str], ray: subprocess.Popen[bytes]) -> int:
        """A command's exit code. It ends by SIGTERM when the job is told to stop."""
        if self._told:
            return STOPPED
        self._driver = subprocess.Popen(command)
        if self._told:  # while it was started
            self._driver.send_signal(signal.SIGTERM)
        while (code := self._driver.poll()) is None:
            if (self._part.state / "stop").exists():
                self._tell()
            if ray.poll() is not None and not self._told:
                _say(f"Ray ended with code {ray.poll()}; its output is {_output(self._part)}")
                self._tell()
            time.sleep(_POLL_S)
        return STOPPED if self._told and code < 0 else code if code >= 0 else 1

    def _follow(self, ray: subprocess.Popen[bytes]) -> int:
        while not self._part.code_file.exists():
            if ray.poll() is not None:
                time.sleep(5)  # the head's end may be known a little later than its Ray's
                if self._part.code_file.exists():
                    return 0
                _say(f"Ray ended with code {ray.poll()}; its output is {_output(self._part)}")
                return 1
            time.sleep(1)
        return 0

    def _end(self, code: int) -> int:
        if not self._part.rank:
            partial = self._part.code_file.with_suffix(".partial")
            partial.write_text(f"{code}\n")
            partial.replace(self._part.code_file)
        return code


def _own_address() -> str:
    """This host's address by its name; "" if that leads to the host itself, as Debian has it."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
    return "" if address.startswith("127.") else address


def _output(part: Part) -> Path:
    return part.state / f"ray-{socket.gethostname()}.log"


def _start_ray(part: Part) -> subprocess.Popen[bytes]:
    """`ray start`, in the foreground of a process of its own."""
    address = _own_address()
    where = ["--head", f"--port={part.port}"] if not part.rank else [f"--address={part.head}:{part.port}"]
    where += ["--include-dashboard=false"] if not part.rank else []
    where += [f"--node-ip-address={address}"] if address else []
    has = [f"--num-gpus={part.gpus}", f"--num-cpus={part.cpus or len(os.sched_getaffinity(0))}"]
    has += [f"--resources={part.resources}"] if part.resources else []
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--temp-dir={part.temporary}"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        with _output(part).open("wb") as output:
            return subprocess.Popen([*command, *where, *has], stdout=output, stderr=subprocess.STDOUT)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(ray: subprocess.Popen[bytes]) -> None:
    """Ray's processes, which hear nothing else."""
    processes.end(processes.under([ray.pid]), 0.0)
    ray.wait()


def _say(text: str) -> None:
    sys.stderr.write(f"{socket.gethostname()}: {text}\n")


def _part(argv: Sequence[str] | None) -> Part:
    parser = argparse.ArgumentParser(prog="python -m stare_megatron.launch.node")
    add = parser.add_argument
    add("run_file", type=Path)
    add("--command", choices=("train", "sft"), default="train", help="what runs on the first node")
    add("--head", required=True, help="host of the first node")
    add("--port", type=int, default=6379)
    add("--nodes", type=int, default=1, help="of the whole job")
    add("--gpus", type=int, default=0, help="of this node")
    add("--cpus", type=int, default=0, help="of this node; 0: all that this process may use")
    add("--resources", default="", help="further resources of this node, JSON")
    add("--state", type=Path, required=True, help="folder of this start, seen by all nodes")
    add("--first-rank", type=int, default=0, help="rank of the first node of this group")
    add("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", "0")), help="of this node in its group")
    a = parser.parse_args(argv)
    rank = a.first_rank + a.rank
    return Part(rank, a.head, a.port, a.nodes, a.gpus, a.cpus, a.resources, a.state, a.run_file, a.command)


if __name__ == "__main__":
    sys.exit(Node(_part(None)).run())
