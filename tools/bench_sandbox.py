"""Calls per second of the sandbox and what a call costs: python tools/bench_sandbox.py [--calls 200] [--workers 2]

`cold`: a sandbox is started for it, detection of the level and imports included. `warm`: one call at a time, then as
many at once as there are workers. `CPU ms`: of all processes, driver, workers and calls, a call; on a machine that does
other things it is the number to trust. `fresh process`: `python -c` with the same imports and no protection.
"""

# A default given to Field by position is invisible to the type checker.
# pyright: reportCallIssue=false

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import psutil
from rich.console import Console
from rich.table import Table

from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.run.folder import hardware
from stare_megatron.sandbox.level import Level
from stare_megatron.sandbox.pool import Sandbox
from stare_megatron.sandbox.result import Status

PROGRAMS = {
    "trivial": "print(1 + 1)",
    "numpy": "import numpy as np; print(np.linalg.det(np.arange(9.0).reshape(3, 3) + np.eye(3)))",
    "sympy": "import sympy as sp; x = sp.Symbol('x'); print(sp.factor(x**4 - 1))",
}


def cpu_seconds() -> float:
    """CPU time of this process, of what it started, and of their children that have ended."""
    mine = os.times()
    total = mine.user + mine.system + mine.children_user + mine.children_system
    for process in psutil.Process().children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


async def measured(action: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Wall and CPU seconds of an action."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    await action()
    return time.perf_counter() - wall, cpu_seconds() - cpu


async def calls(box: Sandbox, code: str, count: int, at_once: int) -> None:
    """`count` calls, each of which must succeed."""
    turn = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with turn:
            result = await box.run(code)
        if result.status is not Status.OK:
            raise RuntimeError(f"{result.status.value}: {result.stderr}")

    await asyncio.gather(*(one() for _ in range(count)))


async def cells(box: Sandbox, code: str, count: int) -> None:
    """`count` cells of one kept state."""
    async with box.session() as session:
        for _ in range(count):
            await session.run(code)


async def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=200, help="calls per measurement")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--level", choices=[level.value for level in Level], help="default: the strongest")
    options = parser.parse_args(arguments)
    level = Level(options.level) if options.level else None
    config = SandboxConfig(workers=options.workers, require="limits", wall_seconds=120)
    table = Table(
        title=f"{hardware()}, load {os.getloadavg()[0]:.0f}, {options.calls} calls, {options.workers} workers"
    )
    for column in ("program", "how", "calls/s", "wall ms", "CPU ms"):
        table.add_column(column, justify="left" if column in ("program", "how") else "right")

    def row(program: str, how: str, count: int, taken: tuple[float, float]) -> None:
        wall, cpu = taken
        table.add_row(program, how, f"{count / wall:.1f}", f"{1000 * wall / count:.1f}", f"{1000 * cpu / count:.1f}")

    async def cold(code: str) -> None:
        async with Sandbox(config, level) as box:
            await calls(box, code, 1, 1)

    for program, code in PROGRAMS.items():
        row(program, "cold", 1, await measured(lambda code=code: cold(code)))
    async with Sandbox(config, level) as box:
        for program, code in PROGRAMS.items():
            await calls(box, code, options.workers, 1)
            row(
                program,
                "warm, one at a time",
                options.calls,
                await measured(lambda c=code: calls(box, c, options.calls, 1)),
            )
            many = await measured(lambda c=code: calls(box, c, options.calls, options.workers))
            row(program, f"warm, {options.workers} at once", options.calls, many)
            row(program, "kept state", options.calls, await measured(lambda c=code: cells(box, c, options.calls)))
        used = box.level
    for program, code in PROGRAMS.items():

        async def fresh(code: str = code) -> None:
            for _ in range(3):
                subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

        row(program, "fresh process", 3, await measured(fresh))
    table.caption = f"level {used.value}"
    Console().print(table)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
