"""CPUs that this process may use, which are not all that its machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Those it is bound to, or as many as its control group's quota is worth where that is less; at least 1. `proc`:
    the process's groups; `cgroups`: where the groups' files are, of version 2 or 1."""
    bound = len(os.sched_getaffinity(0))
    return max(1, min([bound, *(math.ceil(quota) for quota in _quotas(proc, cgroups))]))


def _quotas(proc: Path, cgroups: Path) -> Iterator[float]:
    """CPUs by the quota of the process's group and of each that this is in."""
    if not proc.is_file():
        return
    for line in proc.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see its own group as the root, under a path that is not there.
        folder = cgroups / controllers if controllers else cgroups
        inner = Path(path.lstrip("/"))
        for place in (inner, *inner.parents):
            quota = _quota(folder / place)
            if quota is not None:
                yield quota


def _quota(folder: Path) -> float | None:
    """CPUs; None without a limit."""
    try:
        if (both := folder / "cpu.max").is_file():
            most, period = both.read_text().split()
        else:
            most, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return None
    return None if most in ("max", "-1") else int(most) / int(period)
