"""One vLLM engine as a Ray actor, with the episodes that run on it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray

from stare_megatron.cluster import runtime
from stare_megatron.cluster.activity import ActivityLog
from stare_megatron.cluster.doing import Answers, ray_actor
from stare_megatron.cluster.families import Family, family
from stare_megatron.cluster.parts import joined
from stare_megatron.cluster.sandboxes import make_client
from stare_megatron.config import Config
from stare_megatron.data.tokenizer import first_line
from stare_megatron.sandbox.client import SandboxClient
from stare_megatron.types import Begun, Completion, Group, GroupRequest, GroupSummary
from stare_megatron.types.report import EngineReport

if TYPE_CHECKING:
    from stare_megatron.inference.engine import Engine


class Runner(Protocol):
    """Samples and scores groups: `rollout.groups.Runner`."""

    async def __call__(self, request: GroupRequest, samples: Sequence[int] = ()) -> tuple[Group, GroupSummary]: ...

    def begun(self, drawn: Mapping[int, Completion]) -> dict[int, Begun]: ...


_GLANCE_S = 1.0

# Built in the composition root, with the engine and, where code is run, an open sandbox.
# The clock stands while the engine sleeps.
MakeRunner = Callable[["Engine", SandboxClient | None, Callable[[], float]], Runner]


@ray_actor
class EngineActor(Answers):
    """One engine and the episodes that run on it. vLLM is imported in this process only."""

    def __init__(
        self, config: Config, index: int, transport: str, make_runner: MakeRunner, sandboxes: Sequence[Any], logs: Path
    ) -> None:
        runtime.enter_actor(logs, f"engine_{index}")
        if config.cluster.address != "local":
            runtime.use_network_of_node()
        self._config = config
        self._index = index
        self._transport = transport
        self._make_runner = make_runner
        self._sandboxes = sandboxes
        self._opened = contextlib.AsyncExitStack()
        self._failure = ""
        self._calls = 0
        self._answer: asyncio.Future[None] | None = None
        self._activity = ActivityLog()

    async def hello(self) -> runtime.Station:
        return runtime.station()

    async def prepare(self) -> None:
        """Import what `start` needs; it takes nothing of a GPU, whoever has it."""
        from stare_megatron.inference.front_end import import_vllm

        await asyncio.to_thread(import_vllm)

    async def start(self) -> Family:
        """Returns the processes of the engine."""
        from stare_megatron.inference.engine import Engine

        config = self._config
        self._engine = Engine(
            f"engine {self._index}",
            config.model.path,
            config.model.dtype,
            config.inference,
            config.window,
            config.run.seed,
            self._transport,
            keeps_kv=config.sampling.kv == "keep",
        )
        await self._engine.start()
        box = None
        if config.uses_sandbox:
            box = await self._opened.enter_async_context(make_client(config.sandbox, self._sandboxes))
        self._run = self._make_runner(self._engine, box, self._engine.clock)
        # What a start makes lives as long as the process. Going through it, the collector stopped every fifth rollout.
        gc.collect()
        gc.freeze()
        return family()

    @ray.method(num_returns=2)
    async def run_group(self, request: GroupRequest, samples: Sequence[int]) -> tuple[Group, GroupSummary]:
        with self._activity.during("sample", request.prompt.id):
            return await self._run(request, samples)

    @ray.method(num_returns=2)
    async def join(self, reflections: tuple[int, ...], *parts: Group) -> tuple[Group, GroupSummary]:
        """A group of what several engines sampled of it; tokens do not pass through the driver."""
        return joined(reflections, parts)

    async def begun(self) -> dict[int, Begun]:
        """What there is of each group under way, by the seed of its request."""
        return self._run.begun(await self._engine.drawn())

    async def call(self, method: str, *args: Any) -> Any:
        """A method of the engine, by its name."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._activity.during(method))
            stack.push(functools.partial(self._keep_failure, method))
            self._calls += 1
            stack.callback(self._call_ended)
            if method == "init_weight_transfer_engine":  # it joins, maybe again: what was before does not count
                self._failure = ""
            found = getattr(self._engine, method)(*args)
            return await found if inspect.isawaitable(found) else found

    def _call_ended(self) -> None:
        self._calls -= 1

    def _keep_failure(self, method: str, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._failure = f"{method}: {first_line(error)}"

    async def failure(self) -> str:
        """The last error of `call`, "" if there was none: a trainer rank that it was raised to may be blocked."""
        return self._failure

    async def calls(self) -> int:
        """How many of `call` are under way."""
        return self._calls

    async def pulse(self) -> str:
        """Returns when the engine's core has answered; it need not while a call keeps it busy, such as a push of
        weights. "", or what is wrong with the engine's processes.

        Raises:
            EngineLostError: the core died.
        """
        if stopped := self._engine.stopped():
            return stopped
        self._answer = self._answer or asyncio.ensure_future(self._engine.answer())
        while not self._answer.done():
            await asyncio.wait([self._answer], timeout=_GLANCE_S)
            if self._calls and not self._answer.done():
                return self._engine.stopped()
        answer, self._answer = self._answer, None
        await answer
        return ""

    async def report(self) -> EngineReport:
        return EngineReport(self._activity.take(), self._engine.peak_memory_bytes(), self._engine.load())

    async def close(self) -> None:
        await self._opened.aclose()
        await self._engine.close()
