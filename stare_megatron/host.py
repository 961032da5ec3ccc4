"""Memory of the machine the driver runs on."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class HostMemory:
    """`run`: proportional set sizes of this process and all under it, summed, so that shared pages count once;
    `available`: what processes could still get without swapping. Bytes."""

    run: int
    available: int


def host_memory() -> HostMemory:
    """Now. Processes that end meanwhile do not count. A joined Ray's actors are not under this process."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return HostMemory(total, psutil.virtual_memory().available)
