"""The driver's side of one worker process: start it, have it fork confined children, notice its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import stare_megatron
from stare_megatron.sandbox import scratch
from stare_megatron.sandbox.plan import Limits, Plan, encode
from stare_megatron.sandbox.runner import READY
from stare_megatron.sandbox.zygote import MESSAGE

_START = (
    "import sys; sys.path.insert(0, {root!r}); from stare_megatron.sandbox.zygote import main; sys.path.pop(0); main()"
)
_START_SECONDS = 120.0  # imports on a loaded machine
_FORK_SECONDS = 30.0
_END_SECONDS = 10.0
# Threads would make a fork unsafe, and each call slower.
_ENVIRONMENT = {
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB")},
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "MPLBACKEND": "agg",
}


class WorkerError(Exception):
    """The worker, not the code in it, failed: it does not start, or it died. One line."""


@dataclass(frozen=True)
class Exit:
    """How a child ended, from its real parent: wait status and CPU milliseconds over its life."""

    status: int
    cpu_ms: float


class Child:
    """One confined process and the driver's ends of its files. Waits in its first read until it is given a cell."""

    def __init__(self, limits: Limits, worker: Worker) -> None:
        self.limits = limits
        self.worker = worker
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.stdin = os.memfd_create("stdin")
        self.code = os.memfd_create("code")
        self.stdout, stdout = os.pipe2(os.O_CLOEXEC)
        self.stderr, stderr = os.pipe2(os.O_CLOEXEC)
        go, self.go = os.pipe2(os.O_CLOEXEC)
        self.report, report = os.pipe2(os.O_CLOEXEC)
        for fd in (self.stdout, self.stderr, self.report):
            os.set_blocking(fd, False)
        self.theirs = [self.stdin, stdout, stderr, self.code, go, report]
        self.pidfd = -1
        self.pid = 0  # as this process sees it

    def handed_over(self) -> None:
        """The worker has them: close the child's ends here."""
        for fd in self.theirs[1:3] + self.theirs[4:]:
            os.close(fd)
        self.theirs = []

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a child that is gone already does not mind."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    async def close(self) -> Exit | None:
        """Kill it, wait for its end (None if the worker cannot tell), and remove what it leaves."""
        self.signal(signal.SIGKILL)
        exit_ = None
        with contextlib.suppress(WorkerError, TimeoutError):
            async with asyncio.timeout(_FORK_SECONDS):
                exit_ = await asyncio.shield(self.ended)
        if self.theirs:
            self.handed_over()
        for fd in (self.stdin, self.code, self.stdout, self.stderr, self.go, self.report, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = -1
        if self.scratch:
            await asyncio.to_thread(scratch.remove, self.scratch)
        return exit_

    @property
    def scratch(self) -> str:
        """Its scratch directory on the machine's file system; "" where it has one that only it sees."""
        return "" if self.worker.plan.namespaces else os.path.join(self.worker.base, self.limits.name)


class Worker:
    """A zygote process. Use it from one event loop; `start` before anything else."""

    def __init__(self, plan: Plan, value_bytes: int) -> None:
        self.base = tempfile.mkdtemp(prefix="sandbox-")
        os.chmod(self.base, 0o711)  # children pass through it, and cannot list it
        self.plan = replace(plan, base=self.base)
        self._value_bytes = value_bytes
        self._children: dict[str, Child] = {}
        self._forked: dict[str, asyncio.Future[int]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self.alive = False

    async def start(self) -> None:
        """Raises:
        WorkerError: it does not come up; says why.
        """
        loop = asyncio.get_running_loop()
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(stare_megatron.__file__).resolve().parents[1])
        paths = {"LD_LIBRARY_PATH": os.environ["LD_LIBRARY_PATH"]} if os.environ.get("LD_LIBRARY_PATH") else {}
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-B", "-X", "utf8", "-c", _START.format(root=root)),
                *(encode(self.plan), str(theirs.fileno()), str(self._value_bytes)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env=_ENVIRONMENT | paths,
                start_new_session=True,
                cwd="/",
            )
        mine.setblocking(False)
        self._control = mine
        try:
            async with asyncio.timeout(_START_SECONDS):
                message = await loop.sock_recv(mine, MESSAGE)
        except (TimeoutError, ConnectionError) as e:
            raise WorkerError(f"no answer from a new worker: {e or type(e).__name__}") from e
        if not message:
            assert self._process.stderr
            error = (await self._process.stderr.read()).decode(errors="replace").strip().splitlines()
            raise WorkerError(f"a new worker died: {error[-1] if error else 'without a word'}")
        if refused := json.loads(message).get("refused"):
            raise WorkerError(refused)
        self.alive = True
        loop.add_reader(mine, self._hear)

    async def fork(self, limits: Limits) -> Child:
        """A new child that has given up what it must; `limits.name` is given a fresh value.

        Raises:
            WorkerError: the worker is dead, or the child cannot be confined.
        """
        if not self.alive or self._control is None:
            raise WorkerError("the worker is dead")
        loop = asyncio.get_running_loop()
        limits = replace(limits, name=secrets.token_hex(8))
        child = Child(limits, self)
        self._children[limits.name] = child
        self._forked[limits.name] = loop.create_future()
        try:
            socket.send_fds(self._control, [encode(limits).encode()], child.theirs)
            child.handed_over()
            async with asyncio.timeout(_FORK_SECONDS):
                child.pidfd = await self._forked[limits.name]
                child.pid = _pid(child.pidfd)
                await _confined(child)
        except (OSError, TimeoutError) as e:
            self._died("the worker does not answer")
            await child.close()
            raise WorkerError(f"no child from the worker: {e or type(e).__name__}") from e
        except BaseException:
            await child.close()
            raise
        finally:
            self._forked.pop(limits.name, None)
        return child

    def _hear(self) -> None:
        """A message from the worker, or its end."""
        assert self._control
        try:
            message, files, _, _ = socket.recv_fds(self._control, MESSAGE, 1)
        except BlockingIOError:
            return
        except ConnectionError:
            message, files = b"", []
        if not message:
            self._died("the worker died")
            return
        said = json.loads(message)
        if "forked" in said:
            waiting = self._forked.get(said["forked"])
            if waiting is not None and not waiting.done():
                waiting.set_result(files[0])
            else:
                os.close(files[0])
        elif "failed" in said:
            self._fail(said["failed"], said["why"])
        elif "ended" in said:
            child = self._children.pop(said["ended"], None)
            if child is not None and not child.ended.done():
                child.ended.set_result(Exit(said["status"], said["cpu_ms"]))

    def _fail(self, name: str, why: str) -> None:
        waiting, child = self._forked.get(name), self._children.pop(name, None)
        if waiting is not None and not waiting.done():
            waiting.set_exception(WorkerError(why))
        if child is not None and not child.ended.done():
            child.ended.set_exception(WorkerError(why))
            child.ended.exception()  # may never be awaited

    def _died(self, why: str) -> None:
        self.alive = False
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        for name in list(self._children):
            self._fail(name, why)

    async def close(self) -> None:
        """End it and its children, and remove its directory."""
        children = list(self._children.values())
        self._died("the worker was closed")
        if self._process is not None:
            try:
                async with asyncio.timeout(_END_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        for child in children:
            child.signal(signal.SIGKILL)
            if child.scratch:
                await asyncio.to_thread(scratch.remove, child.scratch)
        await asyncio.to_thread(scratch.remove, self.base)


def _pid(pidfd: int) -> int:
    """The process behind a pidfd, as this process numbers it."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "Pid":
            return int(value)
    raise ProcessLookupError("the kernel does not say whose pidfd it is")


async def _confined(child: Child) -> None:
    """Wait for the child's word, given before it runs anything, that it is confined."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(child.report, lambda: readable.done() or readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(child.report)
    if os.read(child.report, 1) != READY:
        with contextlib.suppress(BlockingIOError):
            raise WorkerError(f"a child cannot be confined: {os.read(child.stderr, 4096).decode(errors='replace')}")
        raise WorkerError("a child cannot be confined, and does not say why")
