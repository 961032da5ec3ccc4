"""Before a pod ends: `python -m stare_megatron.launch.drain LOGS`.

Has the run of this pod, if the driver is here, end its step and save, waits for it, and copies Ray's own logs to
`LOGS/HOST`. Kubernetes bounds the wait by `terminationGracePeriodSeconds`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from stare_megatron.launch import logs

_RAY = Path("/tmp/ray")


def drivers() -> list[psutil.Process]:
    """Processes of `stare-megatron train` and `sft` on this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = [Path(word).name for word in process.cmdline()]
            if {"train", "sft"} & set(words) and ("stare-megatron" in words or "stare_megatron" in words):
                found.append(process)
    return found


def drain(found: Sequence[psutil.Process], temporary: Path, target: Path) -> None:
    """Have them end, wait for them, and bring Ray's logs from its folder `temporary` to `target`."""
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(found)
    logs.keep(temporary, target)


if __name__ == "__main__":
    drain(drivers(), _RAY, Path(sys.argv[1]) / socket.gethostname())
