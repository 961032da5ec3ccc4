"""What other processes of this machine are at, seen from outside (Linux): they may be stopped, or beyond an answer."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from stare_megatron.host.evidence import MachineState, ProcessState, ProcessTree
from stare_megatron.host.stacks import STACKS_SIGNAL

_WRITE_S = 2.0  # for a process to write its stacks
_POLL_S = 0.05
_QUIET = 4  # looks in which nothing came: then it is all there, though a busy machine may stop who writes
_LOG_BYTES = 16_384


def examine(pids: Sequence[int]) -> MachineState:
    """This machine, and the processes with these ids and all under them, about which nothing is known but that. Those
    that catch SIGUSR1 are made to write their stacks to their stderr, which is read back where it is a file."""
    trees = {pid: ProcessTree(tuple(_state(p) for p in _tree(pid)), _log_end(pid)) for pid in pids}
    return MachineState(platform.node(), trees, machine_text())


def under(pids: Iterable[int]) -> list[list[psutil.Process]]:
    """Processes and all under them, parents first."""
    return [_tree(pid) for pid in pids]


def end(trees: Sequence[Sequence[psutil.Process]], grace: float) -> None:
    """Kill what `under` found: stopped processes do not end by themselves. `grace`: seconds that the parents have to
    end in another way; what is under them has none."""
    _kill(p for tree in trees for p in tree[1:])
    _, left = psutil.wait_procs([p for tree in trees for p in tree[:1]], timeout=grace)
    _kill(left)


def _kill(of: Iterable[psutil.Process]) -> None:
    for process in of:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _state(process: psutil.Process) -> ProcessState:
    pid = process.pid
    parent, name, status, threads, size = 0, "?", "gone", 0, 0
    with contextlib.suppress(psutil.Error), process.oneshot():
        parent, name, status = process.ppid(), _name(process), str(process.status())
        threads, size = process.num_threads(), process.memory_info().rss
    stacks = "" if status in _CANNOT_WRITE else stacks_of(pid)
    waits_in = _read(f"/proc/{pid}/wchan")
    return ProcessState(
        pid=pid,
        parent=parent,
        name=name,
        status=status,
        waits_in="" if waits_in == "0" else waits_in,
        kernel=_read(f"/proc/{pid}/stack"),
        threads=threads,
        bytes=size,
        stacks=stacks,
    )


_CANNOT_WRITE = ("gone", psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE)


def _name(process: psutil.Process) -> str:
    """As it calls itself: Ray and vLLM set titles."""
    return " ".join(process.cmdline()).strip()[:120] or process.name()


def stacks_of(pid: int) -> str:
    """The Python stacks of all threads of a process that has called `write_stacks_on_signal`; "" where it has not, or
    does not write, or not to a file."""
    if not _catches(pid, STACKS_SIGNAL):
        return ""
    try:
        log = Path(os.readlink(f"/proc/{pid}/fd/2"))
        before = log.stat().st_size
        os.kill(pid, STACKS_SIGNAL)
        size, quiet, until = before, 0, time.monotonic() + _WRITE_S
        while quiet < _QUIET and time.monotonic() < until:
            time.sleep(_POLL_S)
            now = log.stat().st_size
            quiet = quiet + 1 if now == size > before else 0
            size = now
        with log.open("rb") as file:
            file.seek(before)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _catches(pid: int, number: int) -> bool:
    """Whether a signal would be handled, and not end the process."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _log_end(pid: int) -> str:
    """What the process wrote last, if to a file."""
    try:
        with open(f"/proc/{pid}/fd/2", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def machine_text() -> str:
    """Memory, load, and what `nvidia-smi` says, where there is one."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    lines = [
        f"{platform.node()}: memory {memory.used / 2**30:.1f} of {memory.total / 2**30:.1f} GiB used, "
        f"{memory.available / 2**30:.1f} available; swap {swap.used / 2**30:.1f} of {swap.total / 2**30:.1f} GiB used; "
        f"load {', '.join(f'{n:.1f}' for n in os.getloadavg())} on {os.cpu_count()} CPUs"
    ]
    if shutil.which("nvidia-smi"):
        try:
            done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False, timeout=20)
            lines.append(done.stdout + done.stderr)
        except subprocess.TimeoutExpired:
            lines.append("nvidia-smi: no answer within 20 s, as when a GPU or its driver hangs")
    return "\n".join(lines)
