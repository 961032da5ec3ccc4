"""The sandbox of a run: a pool of Ray actors, and the box through which an engine's episodes reach them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import ray.exceptions

from stare_megatron.cluster import runtime
from stare_megatron.cluster.sandbox_actor import Call, SandboxActor, Where
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.errors import RunError, UserError
from stare_megatron.sandbox.remote import RemoteSandbox
from stare_megatron.sandbox.result import Result, lost
from stare_megatron.sandbox.session import Session

log = logging.getLogger(__name__)

_MARGIN_SECONDS = 10.0  # for the way there and back, and the actor's own work
_START_SECONDS = 120.0  # of a replaced actor, its workers' imports included
_AHEAD = 2  # calls under way for each worker: one that runs, one that comes next


class _Lost(Exception):
    """No answer to a call of an actor; says why."""


class Sandboxes:
    """The driver's handle: starts the actors, waits for them, ends them. `actors` go to the engines, for `make_client`.

    `places`: Ray options of each. There are none where no code is run, and with `sandbox.url`, where engines speak to
    the server.
    """

    def __init__(self, config: SandboxConfig, logs: Path, places: Sequence[Mapping[str, Any]]) -> None:
        options: dict[str, Any] = {
            "max_restarts": -1,
            "max_task_retries": 0,  # a call that brought an actor down must not bring the next one down
            "max_concurrency": 10000,  # waiting is bounded by the box and the actor
        }
        self.actors: list[Any] = [
            SandboxActor.options(**options, **place).remote(config, i, logs) for i, place in enumerate(places)
        ]
        count = len(places)
        self.crew = runtime.Crew([f"sandbox {i}" for i in range(count)], lambda _: None, named_hosts=False)
        self._starting = [actor.start.remote() for actor in self.actors]

    def ready(self, timeout: float) -> list[Where]:
        """Wait until every actor can run code; says where each is.

        Raises:
            UserError: an actor's node does not give the required level. RunError: an actor does not start.
        """
        return self.crew.wait(self._starting, "start", timeout)

    def close(self) -> None:
        """Stop every actor; one that does not answer within 10 s is killed."""
        refs = [actor.close.remote() for actor in self.actors]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=10.0)
        for actor in self.actors:
            ray.kill(actor)


def make_client(config: SandboxConfig, actors: Sequence[Any]) -> PoolBox | RemoteSandbox:
    """A box for one process, to be entered there: the server of `sandbox.url`, else the pool."""
    return RemoteSandbox(config) if config.url else PoolBox(config, actors)


class PoolBox:
    """A `SandboxClient` over actors, for one event loop: a call goes to the least busy one, a state's cells to its own.

    Every call ends in bounded time, at most `queue_seconds` twice, its own limit and a margin. What an actor that
    dies or hangs was doing is `Status.LOST`, and so are later cells of its states; Ray restarts it, and it gets no
    calls until it answers.
    """

    def __init__(self, config: SandboxConfig, actors: Sequence[Any]) -> None:
        self._config = config
        self._actors = list(actors)
        self._load = [0] * len(self._actors)
        self._down: set[int] = set()
        self._free = asyncio.Semaphore(_AHEAD * config.workers * len(self._actors))
        self._up = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> PoolBox:
        self._spawn(self._watch())
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def check(self) -> bool:
        """Whether a call gets through now."""
        return (await self.run("print('well')")).stdout == "well\n"

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = math.inf) -> Result:
        """Run a program from a fresh state; see `Sandbox.run`."""
        began = time.monotonic()
        try:
            async with self._turn():
                actor = await self._pick()
                return await self._call(actor, "run", Call(code, stdin, echo, seconds))
        except _Lost as e:
            return lost(str(e), 1000 * (time.monotonic() - began))

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A state kept across cells, on one actor. Where none can be had, every cell is lost."""
        key = uuid.uuid4().hex
        actor, fault = -1, ""
        try:
            actor = await self._pick()
            self._load[actor] += 1
            fault = await self._ask(actor, "keep", self._config.queue_seconds + _MARGIN_SECONDS, key)
        except _Lost as e:
            fault = str(e)
        try:
            yield _PoolSession(self, actor, key, fault)
        finally:
            if actor >= 0:
                self._load[actor] -= 1
                self._actors[actor].drop.remote(key)  # nobody waits for it

    async def cell(self, actor: int, key: str, call: Call) -> Result:
        """Run a cell of a state."""
        began = time.monotonic()
        try:
            async with self._turn():
                return await self._call(actor, "cell", key, call)
        except _Lost as e:
            return lost(str(e), 1000 * (time.monotonic() - began))

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Back-pressure: a place among this process's calls."""
        try:
            async with asyncio.timeout(self._config.queue_seconds):
                await self._free.acquire()
        except TimeoutError:
            raise _Lost(f"the sandbox had no turn within {self._config.queue_seconds:g} s") from None
        try:
            yield
        finally:
            self._free.release()

    async def _pick(self) -> int:
        """The actor with the fewest calls and states, of those that answer."""
        try:
            async with asyncio.timeout(self._config.queue_seconds), self._up:
                await self._up.wait_for(lambda: len(self._down) < len(self._actors))
        except TimeoutError:
            raise _Lost(f"no sandbox actor answered within {self._config.queue_seconds:g} s") from None
        return min((i for i in range(len(self._actors)) if i not in self._down), key=self._load.__getitem__)

    async def _call(self, actor: int, method: str, *args: Any) -> Result:
        call = args[-1]
        limit = self._config.queue_seconds + min(self._config.wall_seconds, call.seconds) + _MARGIN_SECONDS
        self._load[actor] += 1
        try:
            return await self._ask(actor, method, limit, *args)
        finally:
            self._load[actor] -= 1

    async def _ask(self, actor: int, method: str, limit: float, *args: Any) -> Any:
        """An actor's answer within `limit` seconds; an actor that is dead, or silent for so long, is put aside."""
        ref = getattr(self._actors[actor], method).remote(*args)
        answer = asyncio.wrap_future(ref.future())
        try:
            done, _ = await asyncio.wait([answer], timeout=limit)
            if not done:
                self._put_aside(actor)
                raise _Lost(f"sandbox {actor} did not answer within {limit:.0f} s")
            return answer.result()
        except ray.exceptions.RayTaskError as e:
            if not isinstance(e.cause, UserError | RunError):
                raise
            self._put_aside(actor)
            raise _Lost(f"sandbox {actor}: {e.cause}") from e
        except ray.exceptions.RayError as e:
            self._put_aside(actor)
            raise _Lost(f"sandbox {actor} died: {type(e).__name__}") from e
        finally:
            if not answer.done():
                ray.cancel(ref)

    def _put_aside(self, actor: int) -> None:
        if actor not in self._down:
            log.warning("sandbox %d does not answer: it gets no calls until it does", actor)
            self._down.add(actor)
            self._spawn(self._revive(actor))

    async def _revive(self, actor: int) -> None:
        """Have an actor replaced if it is silent, and give it calls again once it can run code."""
        while not (await self._pings(actor) and await self._starts(actor)):
            await asyncio.sleep(min(1.0, self._config.health_seconds))
        log.warning("sandbox %d answers again", actor)
        async with self._up:
            self._down.discard(actor)
            self._up.notify_all()

    async def _watch(self) -> None:
        """Health checks, so that an actor that hangs is found before a call runs into it."""
        while True:
            await asyncio.sleep(self._config.health_seconds)
            up = [i for i in range(len(self._actors)) if i not in self._down]
            for actor, well in zip(up, await asyncio.gather(*map(self._pings, up)), strict=True):
                if not well:
                    self._put_aside(actor)

    async def _pings(self, actor: int) -> bool:
        """Whether it answers; one that is silent for `health_seconds` is killed, and Ray restarts it."""
        answer = asyncio.wrap_future(self._actors[actor].ping.remote().future())
        done, _ = await asyncio.wait([answer], timeout=self._config.health_seconds)
        if not done:
            log.warning("sandbox %d was silent for %.0f s: it is replaced", actor, self._config.health_seconds)
            ray.kill(self._actors[actor], no_restart=False)
            return False
        return answer.exception() is None

    async def _starts(self, actor: int) -> bool:
        answer = asyncio.wrap_future(self._actors[actor].start.remote().future())
        done, _ = await asyncio.wait([answer], timeout=_START_SECONDS)
        return bool(done) and answer.exception() is None

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _PoolSession:
    """A state on one actor."""

    def __init__(self, box: PoolBox, actor: int, key: str, fault: str) -> None:
        self._box, self._actor, self._key, self._fault = box, actor, key, fault

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = math.inf) -> Result:
        """Run a cell in the kept state; `Status.LOST` once its actor is gone."""
        if self._fault:
            return lost(self._fault)
        return await self._box.cell(self._actor, self._key, Call(code, stdin, echo, seconds))
