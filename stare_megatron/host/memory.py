"""Memory of the machine the driver runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class HostMemory:
    """`run`: memory of this process and all under it; `available`: what processes could still get without swapping.
    Bytes."""

    run: int
    available: int


def host_memory() -> HostMemory:
    """Now. A joined Ray's actors are not under this process.

    Files and libraries in memory do not count, and of shared memory (Ray's object store) only the largest part that a
    process has mapped. Proportional set sizes would count everything once, but the kernel takes seconds to add them up.
    """
    me = psutil.Process()
    sizes = [status_bytes(p.pid, "RssAnon", "RssShmem") for p in [me, *me.children(recursive=True)]]
    own = sum(anonymous for anonymous, _ in sizes)
    return HostMemory(own + max(shared for _, shared in sizes), psutil.virtual_memory().available)


def status_bytes(pid: int, *names: str) -> list[int]:
    """Sizes that `/proc/PID/status` gives of a process, bytes (Linux); zeros when it has ended.

    Example:
        status_bytes(os.getpid(), "RssAnon", "VmHWM")
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return [0] * len(names)
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return [int(fields.get(name, "0 kB").split()[0]) * 1024 for name in names]
