"""One cell of code in one child, watched from outside: what it says is collected, what it may use up is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from dataclasses import dataclass, replace

from stare_megatron.sandbox import runner, scratch
from stare_megatron.sandbox.result import Result, Status, lost
from stare_megatron.sandbox.runner import ANSWER, ORDER
from stare_megatron.sandbox.worker import Child, WorkerError

_CHUNK = 65536
_END_SECONDS = 30.0  # for a killed process to be gone, on a loaded machine
_DISK_SECONDS = 0.1  # between two looks at a scratch directory without a quota
_OUTCOMES = {
    runner.OK: Status.OK,
    runner.ERROR: Status.ERROR,
    runner.MEMORY: Status.MEMORY,
    runner.EXITED: Status.EXITED,
}


@dataclass(frozen=True)
class CellLimits:
    """What one cell may use: seconds, and bytes of stdout and stderr together."""

    wall_seconds: float
    cpu_seconds: float
    output_bytes: int

    def within(self, seconds: float) -> CellLimits:
        """The same, but of at most so many seconds."""
        return replace(self, wall_seconds=min(self.wall_seconds, seconds), cpu_seconds=min(self.cpu_seconds, seconds))


class Cell:
    """Runs once: `await Cell(child, limits).run(code, stdin, echo)`."""

    def __init__(self, child: Child, limits: CellLimits) -> None:
        self._child = child
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._token = secrets.token_bytes(16)
        self._out, self._err, self._answer = bytearray(), bytearray(), bytearray()
        # None: the child answered or ended by itself.
        self._over: asyncio.Future[Status | None] = self._loop.create_future()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._exited = self._overflowed = False

    async def run(self, code: str, stdin: str, echo: bool) -> Result:
        """The result. The child lives on, stopped, if it answered; else it is for its owner to `close`."""
        child = self._child
        source = code.encode("utf-8", "surrogatepass")
        _write(child.code, source)
        _write(child.stdin, stdin.encode("utf-8", "surrogatepass"))
        readers = {
            child.stdout: lambda: self._read(child.stdout, self._out),
            child.stderr: lambda: self._read(child.stderr, self._err),
            child.report: self._read_answer,
            child.pidfd: self._end,
        }
        started, cpu = time.monotonic(), self._cpu()
        for fd, callback in readers.items():
            self._loop.add_reader(fd, callback)
        self._arm("wall", self._limits.wall_seconds, lambda: self._decide(Status.TIMEOUT))
        self._arm("cpu", self._limits.cpu_seconds, lambda: self._check_cpu(cpu + self._limits.cpu_seconds))
        if child.scratch:
            self._arm("disk", _DISK_SECONDS, self._check_disk)
        try:
            child.signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):  # it ended before it was asked: seen below
                os.write(child.go, ORDER.pack(self._token, len(source), echo))
            seen = await self._over
        finally:
            for timer in self._timers.values():
                timer.cancel()
            for fd in readers:
                self._loop.remove_reader(fd)
        wall = 1000 * (time.monotonic() - started)
        return await self._verdict(seen, wall, cpu)

    def _arm(self, name: str, seconds: float, callback: object) -> None:
        assert callable(callback)
        self._timers[name] = self._loop.call_later(seconds, callback)

    def _decide(self, status: Status | None) -> None:
        if not self._over.done():
            self._over.set_result(status)

    def _read(self, fd: int, buffer: bytearray) -> None:
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        if not chunk:  # closed; the pidfd says when the process ends
            self._loop.remove_reader(fd)
        self._keep(chunk, buffer)
        if self._overflowed:
            self._decide(Status.OUTPUT)

    def _keep(self, chunk: bytes, buffer: bytearray) -> None:
        room = self._limits.output_bytes - len(self._out) - len(self._err)
        buffer += chunk[:room]
        self._overflowed |= len(chunk) > room

    def _read_answer(self) -> None:
        longest = ANSWER.size + self._limits.output_bytes
        try:
            chunk = os.read(self._child.report, longest + 1 - len(self._answer))
        except BlockingIOError:
            return
        if not chunk:
            self._loop.remove_reader(self._child.report)
            return
        self._answer += chunk
        known = self._answer[:16]
        if len(self._answer) > longest or known != self._token[: len(known)]:
            self._decide(Status.TAMPERED)
        elif len(self._answer) >= ANSWER.size:
            _, outcome, _, length = ANSWER.unpack_from(self._answer)
            size = ANSWER.size + length
            if outcome not in _OUTCOMES or len(self._answer) > size:
                self._decide(Status.TAMPERED)
            elif len(self._answer) == size:
                self._decide(None)

    def _end(self) -> None:
        self._exited = True
        self._read_answer()
        self._decide(None)

    def _cpu(self) -> float:
        """CPU seconds of the child so far; 0 once it has ended."""
        try:
            return time.clock_gettime((~self._child.pid << 3) | 2)  # the kernel's number for a process's CPU clock
        except OSError:
            return 0.0

    def _check_cpu(self, until: float) -> None:
        left = until - self._cpu()
        if left <= 0:
            self._decide(Status.TIMEOUT)
        else:  # one thread cannot use it up faster
            self._arm("cpu", max(left, 0.01), lambda: self._check_cpu(until))

    def _check_disk(self) -> None:
        limits = self._child.limits
        if scratch.over(self._child.scratch, limits.scratch_mb, limits.scratch_files):
            self._decide(Status.DISK)
        else:
            self._arm("disk", _DISK_SECONDS, self._check_disk)

    async def _verdict(self, seen: Status | None, wall_ms: float, cpu_before: float) -> Result:
        """What it came to, from what was seen first."""
        child = self._child
        cpu_ms = 1000 * (self._cpu() - cpu_before)
        child.signal(signal.SIGSTOP if seen is None and not self._exited else signal.SIGKILL)
        code = 0
        if self._exited or seen is not None:
            try:
                async with asyncio.timeout(_END_SECONDS):
                    end = await asyncio.shield(child.ended)
            except (WorkerError, TimeoutError) as e:
                return lost(str(e) or "the worker does not say how the call ended", wall_ms)
            cpu_ms = end.cpu_ms - 1000 * cpu_before
            code = os.waitstatus_to_exitcode(end.status)
        if seen is None:
            self._drain()
        status, value = seen, ""
        if self._overflowed:
            status = Status.OUTPUT
        elif status is None and self._complete:
            _, outcome, raw, length = ANSWER.unpack_from(self._answer)
            status, code = _OUTCOMES[bytes(outcome)], raw
            value = bytes(self._answer[ANSWER.size : ANSWER.size + length]).decode(errors="replace")
        elif status is None:
            status = Status.KILLED if code < 0 else Status.EXITED
            if code == -signal.SIGKILL and cpu_ms >= 1000 * self._limits.cpu_seconds:  # the kernel's own limit
                status = Status.TIMEOUT
        out, err = self._out.decode(errors="replace"), self._err.decode(errors="replace")
        return Result(status, out, err, value, code, max(cpu_ms, 0.0), wall_ms)

    @property
    def _complete(self) -> bool:
        return (
            len(self._answer) >= ANSWER.size and len(self._answer) == ANSWER.size + ANSWER.unpack_from(self._answer)[3]
        )

    def _drain(self) -> None:
        """What was written before the answer and is still in the pipes."""
        for fd, buffer in ((self._child.stdout, self._out), (self._child.stderr, self._err)):
            with contextlib.suppress(BlockingIOError):
                while not self._overflowed and (chunk := os.read(fd, _CHUNK)):
                    self._keep(chunk, buffer)


def _write(fd: int, data: bytes) -> None:
    """Make the file hold `data` and nothing else, to be read from its start."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
