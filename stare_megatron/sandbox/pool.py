"""The sandbox on this machine: a bounded pool of workers, calls, and states kept for an episode."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from types import TracebackType

from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.errors import RunError
from stare_megatron.sandbox.cell import Cell, CellLimits
from stare_megatron.sandbox.detect import detect, plan_for, why_not
from stare_megatron.sandbox.level import Level, Mechanism
from stare_megatron.sandbox.plan import Limits
from stare_megatron.sandbox.result import Result, lost
from stare_megatron.sandbox.session import LocalSession
from stare_megatron.sandbox.worker import Child, Worker, WorkerError

log = logging.getLogger(__name__)

_ATTEMPTS = 3  # at a fork, each with a new worker if the old one is dead


@dataclass
class _Slot:
    """A place for one worker."""

    worker: Worker | None = None
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class Health:
    """Counts since the start, and what is in use now."""

    workers_alive: int
    workers_replaced: int
    calls: int
    waiting: int
    sessions: int


class Sandbox:
    """`async with Sandbox(config) as box: result = await box.run("print(2 + 2)")`.

    Use it from one event loop. Every call ends in bounded time, as a `Result`: a worker that dies costs the call in it
    `Status.LOST`, and is replaced. `level` insists on one level (tests, tools); otherwise the strongest is used.
    """

    def __init__(self, config: SandboxConfig, level: Level | None = None) -> None:
        self._config = config
        self._wanted = level
        self._level: Level | None = None
        self._slots: list[_Slot] = []
        self._free = asyncio.Semaphore(config.workers)
        self._places = asyncio.Semaphore(config.sessions)
        self._sessions: set[LocalSession] = set()
        self._calls = self._waiting = self._replaced = self._turns = 0
        self._limits = Limits("", 0, config.memory_mb, config.scratch_mb, config.scratch_files)
        self.cell_limits = CellLimits(config.wall_seconds, config.cpu_seconds, config.output_bytes)

    @property
    def level(self) -> Level:
        """The level in use."""
        assert self._level is not None, "enter the sandbox first"
        return self._level

    @property
    def mechanisms(self) -> frozenset[Mechanism]:
        """What protects: the level's, and Landlock with namespaces where the kernel has it."""
        extra = {Mechanism.LANDLOCK} if plan_for(self.level, ()).landlock else set()
        return self.level.mechanisms | extra

    def directories(self) -> list[str]:
        """The workers' directories on this machine; they hold the scratch of running calls, if anything."""
        return [slot.worker.base for slot in self._slots if slot.worker is not None]

    async def __aenter__(self) -> Sandbox:
        """Raises:
        UserError: this machine does not give the level that is required.
        RunError: no worker starts.
        """
        require = Level(self._config.require)
        if self._wanted is None:
            found = await detect(require)
            self._level = found.level
            log.info("sandbox level: %s%s", found.level.value, " with Landlock" if found.landlock else "")
            for level, reason in found.missing.items():
                log.info("sandbox level %s is not available: %s", level.value, reason)
        else:
            self._level = self._wanted
            if reason := await why_not(self._wanted):
                raise RunError(f"sandbox level {self._wanted.value}: {reason}; {self._wanted.cure}")
        self._slots = [_Slot() for _ in range(self._config.workers)]
        try:
            for slot in self._slots:
                await self._start(slot)
        except WorkerError as e:
            await self.close()
            raise RunError(f"sandbox: no worker starts: {e}; see sandbox.preload") from e
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End kept states, workers and what they left."""
        for session in list(self._sessions):
            await session.close()
        for slot in self._slots:
            if slot.worker is not None:
                await slot.worker.close()
                slot.worker = None

    def health(self) -> Health:
        """A cheap look at the pool; workers that died are replaced when they are next needed."""
        alive = sum(slot.worker is not None and slot.worker.alive for slot in self._slots)
        return Health(alive, self._replaced, self._calls, self._waiting, len(self._sessions))

    async def check(self) -> bool:
        """Whether a call gets through now."""
        return (await self.run("print('well')")).stdout == "well\n"

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = math.inf) -> Result:
        """Run a program from a fresh state. Waits its turn when all workers are busy. `echo`: give the `repr` of a
        trailing expression as `Result.value`; `seconds`: what the caller has left, less than the limits perhaps.
        """
        async with self.turn():
            started = time.monotonic()
            try:
                child = await self.fork(math.ceil(self._config.cpu_seconds) + 1)
            except WorkerError as e:
                return lost(str(e), 1000 * (time.monotonic() - started))
            try:
                return await Cell(child, self.cell_limits.within(seconds)).run(code, stdin, echo)
            finally:
                await child.close()

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[LocalSession]:
        """A state kept across cells. A cell that does not answer (a limit, an exit of the process) resets it, and so do
        `idle_seconds` without use; it ends on leaving. Waits when `sessions` are open.
        """
        async with self._places:
            session = LocalSession(self, self._config.idle_seconds)
            self._sessions.add(session)
            try:
                yield session
            finally:
                self._sessions.discard(session)
                await session.close()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A place among the calls that run at once."""
        self._calls += 1
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._free.release()

    async def fork(self, cpu_seconds: int) -> Child:
        """A fresh child, `cpu_seconds` its kernel limit over its life. A worker that is dead is replaced.

        Raises:
            WorkerError: none could be had.
        """
        limits = replace(self._limits, cpu_seconds=cpu_seconds)
        slot = self._slots[self._turns % len(self._slots)]
        self._turns += 1
        for attempt in range(_ATTEMPTS):
            try:
                async with slot.starting:
                    if slot.worker is None or not slot.worker.alive:
                        log.warning("a sandbox worker died; it is replaced")
                        self._replaced += 1
                        await self._start(slot)
                assert slot.worker is not None
                return await slot.worker.fork(limits)
            except WorkerError:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _start(self, slot: _Slot) -> None:
        if slot.worker is not None:
            await slot.worker.close()
        slot.worker = None
        worker = Worker(plan_for(self.level, tuple(self._config.preload)), self._config.output_bytes)
        try:
            await worker.start()
        except BaseException:
            await worker.close()
            raise
        slot.worker = worker
