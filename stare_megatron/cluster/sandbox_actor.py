"""One sandbox as a Ray actor: `[sandbox] workers` calls at once on its node, and the states kept for episodes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.cluster import runtime
from stare_megatron.cluster.activity import ActivityLog
from stare_megatron.cluster.doing import Answers, ray_actor
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.sandbox.pool import Health, Sandbox
from stare_megatron.sandbox.result import Result, lost
from stare_megatron.sandbox.session import LocalSession


@dataclass(frozen=True)
class Call:
    """What `Box.run` is given."""

    code: str
    stdin: str
    echo: bool
    seconds: float


@dataclass(frozen=True)
class Where:
    """An actor's node, the level its sandbox uses, and its process."""

    node: str
    level: str
    pid: int


class _Kept:
    """A state and the task that holds its place, so that closing it at any moment frees both."""

    def __init__(self, box: Sandbox) -> None:
        self._box = box
        self.session: asyncio.Future[LocalSession] = asyncio.get_running_loop().create_future()
        self._holder = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        async with self._box.session() as session:
            self.session.set_result(session)
            await asyncio.Event().wait()  # until cancelled

    async def close(self) -> None:
        self._holder.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._holder
        self.session.cancel()


@ray_actor
class SandboxActor(Answers):
    """Ray restarts it when it dies, so its sandbox is opened by the first call. All waiting is bounded."""

    def __init__(self, config: SandboxConfig, index: int, logs: Path) -> None:
        runtime.enter_actor(logs, f"sandbox_{index}")
        self._config = config
        self._activity = ActivityLog()
        self._opening = asyncio.Lock()
        self._box: Sandbox | None = None
        self._turns = asyncio.Semaphore(config.workers)
        self._kept: dict[str, _Kept] = {}

    async def start(self) -> Where:
        """Raises: UserError: this node does not give the required level. RunError: no worker starts."""
        box = await self._open()
        return Where(runtime.node_address(), box.level.value, os.getpid())

    async def ping(self) -> int:
        return os.getpid()

    async def health(self) -> Health:
        return (await self._open()).health()

    async def run(self, call: Call) -> Result:
        box = await self._open()
        return await self._in_turn(box, call)

    async def keep(self, key: str) -> str:
        """Begin a state; returns why there is none, or ""."""
        self._kept[key] = kept = _Kept(await self._open())
        done, _ = await asyncio.wait([kept.session], timeout=self._config.queue_seconds)
        if done and not kept.session.cancelled():
            return ""
        await self.drop(key)
        return f"{self._config.sessions} states are kept: none was free within {self._config.queue_seconds:g} s"

    async def cell(self, key: str, call: Call) -> Result:
        kept = self._kept.get(key)
        if kept is None or not kept.session.done():
            return lost("the sandbox that kept this state was replaced")
        return await self._in_turn(kept.session.result(), call)

    async def drop(self, key: str) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            await kept.close()

    async def close(self) -> None:
        for key in list(self._kept):
            await self.drop(key)
        if self._box is not None:
            await self._box.close()

    async def _open(self) -> Sandbox:
        async with self._opening:
            if self._box is None:
                box = Sandbox(self._config)
                await box.__aenter__()
                self._box = box
            return self._box

    async def _in_turn(self, at: Sandbox | LocalSession, call: Call) -> Result:
        # The sandbox would wait for ever.
        try:
            async with asyncio.timeout(self._config.queue_seconds):
                await self._turns.acquire()
        except TimeoutError:
            return lost(f"all {self._config.workers} workers were busy for {self._config.queue_seconds:g} s")
        try:
            with self._activity.during("run"):
                return await at.run(call.code, call.stdin, echo=call.echo, seconds=call.seconds)
        finally:
            self._turns.release()
