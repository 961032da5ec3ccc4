"""A state kept across the cells of one episode, as in a notebook: a child that stays, stopped between cells."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from stare_megatron.sandbox.cell import Cell, CellLimits
from stare_megatron.sandbox.result import Result, Status, lost
from stare_megatron.sandbox.worker import Child, WorkerError

_LIFE_CPU_SECONDS = 3600  # the kernel's limit on a state's whole life; each cell has its own
_ANSWERED = (Status.OK, Status.ERROR, Status.MEMORY, Status.EXITED)


class Session(Protocol):
    """A state kept across cells."""

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = math.inf) -> Result:
        """Run a cell."""
        ...


class Children(Protocol):
    """What a session needs of the sandbox that made it."""

    cell_limits: CellLimits

    def turn(self) -> AbstractAsyncContextManager[None]:
        """A place among the calls that run at once."""
        ...

    async def fork(self, cpu_seconds: int) -> Child:
        """A fresh child, `cpu_seconds` its kernel limit over its life.

        Raises:
            WorkerError: none could be had.
        """
        ...


class LocalSession:
    """Made by `Sandbox.session`. Cells run one after another; each has the limits of a call of its own."""

    def __init__(self, box: Children, idle_seconds: float) -> None:
        self._box = box
        self._idle_seconds = idle_seconds
        self._child: Child | None = None
        self._reset = ""  # why the next cell starts afresh
        self._turn = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None
        self._closed = False

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = math.inf) -> Result:
        """Run a cell in the kept state; where that was lost, in a fresh one, and stderr begins by saying so."""
        async with self._turn, self._box.turn():
            if self._closed:
                return lost("the session is closed")
            if self._idle is not None:
                self._idle.cancel()
            started = time.monotonic()
            note = f"[the state was reset: {self._reset}]\n" if self._reset else ""
            try:
                if self._child is None:
                    self._child = await self._box.fork(_LIFE_CPU_SECONDS)
            except WorkerError as e:
                return lost(str(e), 1000 * (time.monotonic() - started))
            self._reset = "the cell was cancelled"  # unless it comes to its end
            try:
                result = await Cell(self._child, self._box.cell_limits.within(seconds)).run(code, stdin, echo)
                answered = result.status in _ANSWERED and not self._child.ended.done()
                self._reset = "" if answered else f"the cell before ended with status {result.status.value}"
            finally:
                if self._reset:
                    await self._end()
            if self._child is not None:
                self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._expire)
            return dataclasses.replace(result, stderr=note + result.stderr) if note else result

    @property
    def scratch(self) -> str:
        """Its scratch directory on this machine; "" before the first cell and where only it sees one."""
        return self._child.scratch if self._child is not None else ""

    async def close(self) -> None:
        """End the state; further cells are refused."""
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        async with self._turn:
            await self._end()

    def _expire(self) -> None:
        self._closing = asyncio.get_running_loop().create_task(self._end_idle())

    async def _end_idle(self) -> None:
        async with self._turn:
            self._reset = f"it was not used for {self._idle_seconds:g} s"
            await self._end()

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.close()
