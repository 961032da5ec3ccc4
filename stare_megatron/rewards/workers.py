"""Worker processes for code that may hang or swallow memory: one JSON object a line each way (first the worker writes
the line `ready`), a hard time-out, a memory limit, a new process after either.

Children are started as modules, not forked or spawned by multiprocessing: a fork of a process full of threads and a
second run of its `__main__` are both unwelcome in an engine's process. No signal is used, so the pool works on any
thread and inside Ray actors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import stare_megatron
from stare_megatron.errors import RunError

_LINE_LIMIT = 2**22  # bytes of one reply
_START_SECONDS = 300.0  # imports take 2 s, on a crowded machine a minute
_LOOK_SECONDS = 0.1  # how often a working process's memory is looked at
_GRACE_SECONDS = 0.2  # after the time-out: a reply may lie unread because this event loop was busy
# The kernel's limit on address space, as a multiple of the memory limit: the backstop while nobody looks.
_BACKSTOP = 4


class WorkerError(Exception):
    """One call failed: time-out, too much memory, or the worker died."""


class _WorkerDied(Exception):
    """The process ended while it worked; its exit code, negative for a signal."""


@dataclass(frozen=True)
class WorkerLimits:
    """What one call may take: `seconds` of wall-clock time once a worker has it, `memory` bytes resident."""

    seconds: float
    memory: int


class WorkerPool:
    """At most `size` processes of `python -m module`, started when needed; use it from one event loop.

    A worker ends when its standard input does, and on Linux with the thread that started it, also while it hangs
    (`child.py`), so none outlives the process that started it.
    """

    def __init__(self, module: str, size: int, limits: WorkerLimits) -> None:
        self._module = module
        self._limits = limits
        self._free = asyncio.Semaphore(size)
        self._idle: list[Process] = []

    async def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a worker answer one request. Calls beyond the pool's size wait, and that is not on their clock.

        A worker that dies of something else than its limits (somebody killed it) is replaced and asked once more.

        Raises:
            WorkerError: no answer in time, too much memory, or the worker died twice; it is killed and replaced.
            RunError: a worker does not start.
        """
        async with self._free:
            try:
                return await self._attempt(request)
            except _WorkerDied:
                pass
            try:
                return await self._attempt(request)
            except _WorkerDied as e:
                raise WorkerError(f"worker {self._module} died twice, last with exit code {e}") from e

    async def close(self) -> None:
        """End the idle workers."""
        while self._idle:
            await _kill(self._idle.pop())

    async def _attempt(self, request: dict[str, Any]) -> dict[str, Any]:
        worker = await self._take()
        try:
            reply = await self._within_limits(worker, request)
        except BaseException:  # also when the call is cancelled: the worker is still at it
            await _kill(worker)
            raise
        self._idle.append(worker)
        return reply

    async def _take(self) -> Process:
        while self._idle:
            worker = self._idle.pop()
            if worker.returncode is None:
                return worker
        return await self._start()

    async def _within_limits(self, worker: Process, request: dict[str, Any]) -> dict[str, Any]:
        answer = asyncio.ensure_future(_ask(worker, request))
        watch = asyncio.ensure_future(_watch(worker, self._limits.memory))
        try:
            done, _ = await asyncio.wait((answer, watch), timeout=self._limits.seconds, return_when="FIRST_COMPLETED")
            if not done:
                await asyncio.wait((answer,), timeout=_GRACE_SECONDS)
            if not answer.done() and watch.done():
                watch.result()  # raises what it found
            if not answer.done():
                raise WorkerError(f"no answer within {self._limits.seconds:g} s")
            try:
                return answer.result()
            except (ConnectionError, asyncio.IncompleteReadError) as e:
                raise _WorkerDied(await worker.wait()) from e
        finally:
            for task in (answer, watch):
                task.cancel()
            await asyncio.gather(answer, watch, return_exceptions=True)

    async def _start(self) -> Process:
        root = str(Path(stare_megatron.__file__).resolve().parents[1])
        environment = {
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONHASHSEED": "0",  # the order of sets may decide what sympy tries first
            "OMP_NUM_THREADS": "1",
            "STARE_WORKER_PARENT": str(os.getpid()),
            "STARE_WORKER_ADDRESS_SPACE": str(self._limits.memory * _BACKSTOP),
        }
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self._module),
            stdin=PIPE,
            stdout=PIPE,
            env=os.environ | environment,
            limit=_LINE_LIMIT,
        )
        try:  # imports are not on the clock of the first request
            await asyncio.wait_for(_ready(worker), _START_SECONDS)
        except (TimeoutError, asyncio.IncompleteReadError) as e:
            await _kill(worker)
            raise RunError(f"reward worker {self._module} does not start; its output is in this process's log") from e
        except BaseException:
            await _kill(worker)
            raise
        return worker


async def _ask(worker: Process, request: dict[str, Any]) -> dict[str, Any]:
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write(json.dumps(request).encode() + b"\n")
    await worker.stdin.drain()
    return json.loads(await worker.stdout.readuntil(b"\n"))


async def _watch(worker: Process, memory: int) -> None:
    """Look at the worker's memory until cancelled.

    Looked at from outside: Python's own MemoryError would be caught by the code under test and look like an answer.

    Raises:
        WorkerError: it holds more than `memory` bytes.
    """
    try:
        process = psutil.Process(worker.pid)
        while True:
            held = process.memory_info().rss
            if held > memory:
                raise WorkerError(f"more than {memory >> 20} MB of memory")
            await asyncio.sleep(_LOOK_SECONDS)
    except psutil.NoSuchProcess:
        await asyncio.Event().wait()  # it died: the other task finds out


async def _ready(worker: Process) -> None:
    assert worker.stdout
    await worker.stdout.readuntil(b"ready\n")


async def _kill(worker: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
