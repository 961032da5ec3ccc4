"""Child processes of an engine, so that none outlives it."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

import psutil

from stare_megatron.host.memory import status_bytes

GRACE = 5.0
"""Seconds between the polite signal and the last one."""

_BUFFERS = re.compile(r" (/dev/shm/\S*-cpushm_\d+)$", re.MULTILINE)
"""In a process's maps: where vLLM's workers on CPUs exchange tensors, 2 MiB for each of their threads."""


class ChildProcesses:
    """Processes that this one has started, directly or not, since `begin()`."""

    def __init__(self) -> None:
        self._before: set[psutil.Process] | None = None

    def begin(self) -> None:
        self._before = set(_descendants())

    def unname_buffers(self) -> None:
        """Call it once all workers have mapped their buffers: without a name these go with the last of them. Whoever is
        killed would leave them, and who ends by itself is killed where it is slow to."""
        for process in _descendants():
            with contextlib.suppress(OSError):  # it has ended
                for path in _BUFFERS.findall(Path(f"/proc/{process.pid}/maps").read_text()):
                    Path(path).unlink(missing_ok=True)

    def peak_memory_bytes(self) -> int:
        """Largest resident sizes of this process and of those it started, summed; shared pages count in each."""
        started = [p for p in _descendants() if p not in (self._before or set())]
        return sum(status_bytes(p.pid, "VmHWM")[0] for p in [psutil.Process(), *started])

    def stopped(self) -> str:
        """Names one of them that a signal or a debugger has stopped; "" if none is."""
        for process in _descendants():
            try:
                if process.status() == psutil.STATUS_STOPPED and process not in (self._before or set()):
                    return f"its process {process.pid} is stopped"
            except psutil.NoSuchProcess:
                continue
        return ""

    def end(self) -> None:
        """Terminate what is still there, kill what does not listen; returns when all are gone. Who is deaf to SIGTERM
        (`cluster.runtime`) has children that are."""
        if self._before is None:
            return
        left = [p for p in _descendants() if p not in self._before]
        if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
            for process in left:
                _signal(process, kill=False)
            _, left = psutil.wait_procs(left, timeout=GRACE)
        for process in left:
            _signal(process, kill=True)
        psutil.wait_procs(left, timeout=GRACE)
        self._before = None


def _descendants() -> list[psutil.Process]:
    """All but multiprocessing's resource tracker, which serves this whole process and ends with it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # gone, or a zombie without a command line
            continue
    return found


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return
