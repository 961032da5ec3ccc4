"""Worker processes for code that may hang: one JSON object a line each way (first the worker writes the line
`ready`), a hard time-out, a new process after it.

Children are started as modules, not forked or spawned by multiprocessing: a fork of a process full of threads and a
second run of its `__main__` are both unwelcome in an engine's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import stare_megatron

_LINE_LIMIT = 2**22  # bytes of one reply


class WorkerError(Exception):
    """One call failed: time-out, or the worker died."""


class WorkerPool:
    """At most `size` processes of `python -m module`, started when needed; use it from one event loop.

    A worker ends when its standard input does, so none outlives the process that started it.
    """

    def __init__(self, module: str, size: int, timeout: float) -> None:
        self._module = module
        self._timeout = timeout
        self._free = asyncio.Semaphore(size)
        self._idle: list[Process] = []

    async def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a worker answer one request; the time-out (seconds) begins when a worker has it.

        Raises:
            WorkerError: no answer in time, or the worker died; that worker is killed.
        """
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._start()
            try:
                reply = await asyncio.wait_for(self._ask(worker, request), self._timeout)
            except TimeoutError as e:
                raise WorkerError(f"no answer within {self._timeout:g} s") from e
            except (ConnectionError, asyncio.IncompleteReadError) as e:
                raise WorkerError(f"worker {self._module} died: {e}") from e
            else:
                self._idle.append(worker)
                return reply
            finally:
                if worker not in self._idle:
                    await _kill(worker)

    async def close(self) -> None:
        """End the idle workers."""
        while self._idle:
            await _kill(self._idle.pop())

    async def _start(self) -> Process:
        root = str(Path(stare_megatron.__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self._module),
            stdin=PIPE,
            stdout=PIPE,
            env=os.environ | {"PYTHONPATH": path},
            limit=_LINE_LIMIT,
        )
        try:  # imports are not on the clock of the first request
            await asyncio.wait_for(_ready(worker), 120.0)
        except (TimeoutError, asyncio.IncompleteReadError) as e:
            await _kill(worker)
            raise RuntimeError(f"worker {self._module} does not start; its output is above") from e
        return worker

    async def _ask(self, worker: Process, request: dict[str, Any]) -> dict[str, Any]:
        assert worker.stdin
        assert worker.stdout
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        await worker.stdin.drain()
        return json.loads(await worker.stdout.readuntil(b"\n"))


async def _ready(worker: Process) -> None:
    assert worker.stdout
    await worker.stdout.readuntil(b"ready\n")


async def _kill(worker: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
