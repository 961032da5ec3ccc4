"""Which level this machine gives, found by trying: a worker is started at it, and code in it tries to break out."""

from __future__ import annotations

import json
from dataclasses import dataclass

from stare_megatron.errors import UserError
from stare_megatron.sandbox import landlock
from stare_megatron.sandbox.cell import Cell, CellLimits
from stare_megatron.sandbox.level import Level, Mechanism
from stare_megatron.sandbox.plan import FIRST_UID, Limits, Plan, readable_paths
from stare_megatron.sandbox.result import Status
from stare_megatron.sandbox.worker import Worker, WorkerError

_LIMITS = Limits(name="", cpu_seconds=10, memory_mb=256, scratch_mb=4, scratch_files=16)
_CELL = CellLimits(wall_seconds=20.0, cpu_seconds=10.0, output_bytes=10000)

# Prints the names of the mechanisms that let something through; must work with nothing but the standard library.
_PROBE = f"""
import json, os, socket, sys
import colorsys  # not loaded at start: the interpreter's files must be readable
through = set()
open("probe", "w").write("x")
try:
    if os.fork() == 0:
        os._exit(0)
    through.add({Mechanism.LIMITS.name!r})
except OSError:
    pass
try:
    socket.socket()
    through.add({Mechanism.SECCOMP.name!r})
except OSError:
    pass
for path in ("/etc/passwd", "/proc/self/status"):
    try:
        open(path).close()
        through.add({Mechanism.LANDLOCK.name!r})
    except OSError:
        pass
    if os.path.exists(path):
        through.add({Mechanism.NAMESPACES.name!r})
if os.getuid() == 0:
    through.add({Mechanism.LIMITS.name!r})
print(json.dumps(sorted(through)))
"""


@dataclass(frozen=True)
class Found:
    """The level to use, whether Landlock is part of it, and why each stronger level is not available."""

    level: Level
    landlock: bool
    missing: dict[Level, str]


def plan_for(level: Level, preload: tuple[str, ...]) -> Plan:
    """A worker's plan at that level on this kernel."""
    with_landlock = Mechanism.LANDLOCK in level.mechanisms
    if level is Level.NAMESPACES:
        try:
            with_landlock = landlock.version() > 0
        except OSError:
            with_landlock = False
    return Plan(level.value, with_landlock, base="", preload=preload, uid=FIRST_UID, readable=readable_paths())


async def why_not(level: Level) -> str:
    """ "" if the level is available here, else what stands in its way."""
    worker = Worker(plan_for(level, ()), _CELL.output_bytes)
    try:
        await worker.start()
        child = await worker.fork(_LIMITS)
        try:
            result = await Cell(child, _CELL).run(_PROBE, "", echo=False)
        finally:
            await child.close()
    except WorkerError as e:
        return str(e)
    finally:
        await worker.close()
    if result.status is not Status.OK:
        last = (result.stderr.strip().splitlines() or [result.status.value])[-1]
        return f"plain code does not run in it: {last}"
    through = json.loads(result.stdout)
    broken = sorted(m.name.lower() for m in level.mechanisms if m.name in through)
    return f"not effective: {', '.join(broken)}" if broken else ""


async def detect(require: Level) -> Found:
    """The strongest level this machine gives.

    Raises:
        UserError: weaker than `require`; says what to enable.
    """
    missing: dict[Level, str] = {}
    for level in sorted(Level, reverse=True):
        reason = await why_not(level)
        if not reason:
            return Found(level, plan_for(level, ()).landlock, missing)
        missing[level] = reason
        if level <= require:
            break
    raise UserError(
        f"sandbox.require = {require.value!r} is not available on this machine: {missing[require]}; {require.cure}; or "
        "lower sandbox.require after reading docs/sandbox.md, or set sandbox.url"
    )
