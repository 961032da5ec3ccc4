"""vLLM engines as Ray actors, and the driver's handle: groups go to the least loaded engine."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import inspect
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from stare_megatron.cluster import runtime
from stare_megatron.cluster.activity import ActivityLog
from stare_megatron.cluster.doing import Answers, ray_actor
from stare_megatron.cluster.lookout import Lookout
from stare_megatron.cluster.placement import Slot
from stare_megatron.cluster.sandboxes import make_client
from stare_megatron.config import Config
from stare_megatron.data.tokenizer import first_line
from stare_megatron.errors import RunError
from stare_megatron.sandbox.client import SandboxClient
from stare_megatron.types import Group, GroupRequest, GroupSummary
from stare_megatron.types.report import EngineReport

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stare_megatron.inference.engine import Engine

# Built in the composition root: the engine and, where code is run, an open sandbox go in, a function that samples and
# scores one group comes out.
MakeRunner = Callable[["Engine", SandboxClient | None], Callable[[GroupRequest], Awaitable[tuple[Group, GroupSummary]]]]


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
        self._activity = ActivityLog()

    async def hello(self) -> runtime.Station:
        return runtime.station()

    async def start(self) -> None:
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
        )
        self._engine.keeps_kv = config.sampling.kv == "keep"
        await self._engine.start()
        box = None
        if config.uses_sandbox:
            box = await self._opened.enter_async_context(make_client(config.sandbox, self._sandboxes))
        self._run = self._make_runner(self._engine, box)
        # What a start makes lives as long as the process. Going through it, the collector stopped every fifth rollout.
        gc.collect()
        gc.freeze()

    @ray.method(num_returns=2)
    async def run_group(self, request: GroupRequest) -> tuple[Group, GroupSummary]:
        with self._activity.during("sample", request.prompt.id):
            return await self._run(request)

    async def call(self, method: str, *args: Any) -> Any:
        """A method of the engine, by its name."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._activity.during(method))
            stack.push(functools.partial(self._keep_failure, method))
            found = getattr(self._engine, method)(*args)
            return await found if inspect.isawaitable(found) else found

    def _keep_failure(self, method: str, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._failure = f"{method}: {first_line(error)}"

    async def failure(self) -> str:
        """The last error of `call`, "" if there was none: a trainer rank that it was raised to may be blocked."""
        return self._failure

    async def report(self) -> EngineReport:
        return EngineReport(self._activity.take(), self._engine.peak_memory_bytes(), self._engine.load())

    async def close(self) -> None:
        await self._opened.aclose()
        await self._engine.close()


class EngineGroup:
    """All engines, and the dispatcher that the rollout collects groups through: `submit`, `results`.

    Requests are served in their order by whichever engine has the fewest unfinished sequences. All samples of a group
    share an engine, hence the prefix cache of their prompt. `sandboxes`: actors that run code.
    """

    def __init__(
        self,
        config: Config,
        slots: Sequence[Slot],
        transport: str,
        make_runner: MakeRunner,
        sandboxes: Sequence[Any],
        logs: Path,
        lookout: Lookout,
    ) -> None:
        names = [f"engine {i}" for i in range(len(slots))]
        cluster = config.cluster.address != "local"
        self._crew = runtime.Crew(names, lookout.say, named_hosts=cluster, lookout=lookout)
        self.actors: list[Any] = [
            EngineActor.options(**slot.options, runtime_env={"env_vars": slot.environment}).remote(
                config, i, transport, make_runner, sandboxes, logs
            )
            for i, slot in enumerate(slots)
        ]
        lookout.add("engines", self._crew, self.actors)
        self._timeout = config.cluster.start_timeout
        self._hello = [actor.hello.remote() for actor in self.actors]
        self._starting = [actor.start.remote() for actor in self.actors]
        self._waiting: collections.deque[GroupRequest] = collections.deque()
        self._flying: dict[ray.ObjectRef, tuple[GroupRequest, ray.ObjectRef, int]] = {}
        self._load = [0] * len(self.actors)
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._in_flight = max(_SEQUENCES_IN_FLIGHT, 2 * config.inference.vllm.get("max_num_seqs", 0))

    def ready(self) -> None:
        """Wait until every engine can sample."""
        self._crew.meet(self._hello, self._timeout)
        self._crew.wait(self._starting, "start", self._timeout)

    def check(self) -> None:
        """Raises: RunError: an engine died, or one of its calls failed; names it."""
        asked = [actor.failure.remote() for actor in self.actors]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=_CHECK_S)
        for i, ref in enumerate(asked):
            if ref in done and (failure := runtime.get(ref, self._crew.names[i])):
                raise RunError(f"{self._crew.names[i]}: {failure}")

    def submit(self, requests: Iterable[GroupRequest]) -> None:
        """Sample these too, after those that wait already. Any thread may ask for it while another takes results."""
        with self._lock:
            self._waiting.extend(requests)
            self._send()

    def results(self) -> Iterator[tuple[GroupRequest, ray.ObjectRef, GroupSummary]]:
        """Every submitted request in the order of completion, also what is submitted meanwhile."""
        while flying := {ref: engine for ref, (_, _, engine) in self._flying.copy().items()}:
            done = self._crew.first(flying, "sample", self._given_up)
            with self._lock:
                request, group, engine = self._flying.pop(done)
                self._load[engine] -= request.group_size
                self._send()
            yield request, group, runtime.get(done, self._crew.names[engine])

    def give_up(self) -> None:
        """End `results` within a second, with a RunError; from another thread. Nothing can be sampled after it."""
        self._given_up.set()

    def _send(self) -> None:
        """Requests go out as far as there is room."""
        load = self._load
        while self._waiting and (not min(load) or min(load) + self._waiting[0].group_size <= self._in_flight):
            engine = load.index(min(load))
            request = self._waiting.popleft()
            group, summary = self.actors[engine].run_group.remote(request)
            self._flying[summary] = (request, group, engine)
            load[engine] += request.group_size

    def logprobs(self, token_ids: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float32]]:
        """Each engine's log-probs of a probe prompt."""
        return self._all("logprobs", token_ids.tolist())

    def cache_gaps(self, token_ids: npt.NDArray[np.int32]) -> list[float]:
        """Each engine's, see `Engine.cache_gap`."""
        return self._all("cache_gap", token_ids.tolist())

    def checksums(self, names: Collection[str] = ()) -> list[dict[str, str]]:
        """Each engine's, of the parameters of these names or of all."""
        return self._all("checksums", list(names))

    def reset_prefix_cache(self) -> None:
        """Empty every engine's prefix cache."""
        self._all("reset_prefix_cache")

    def sleep(self, timeout: float = 0.0) -> None:
        """Raises: RunError: an engine failed, or did not answer within `timeout` seconds (0: no limit)."""
        self._all("sleep", timeout=timeout)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self._all("wake", part)

    def report(self) -> list[EngineReport]:
        """What each engine did since it was last asked, and what that took."""
        return self._crew.wait([actor.report.remote() for actor in self.actors], "report")

    def close(self) -> None:
        """Stop every engine; one that does not answer within 20 s is killed."""
        refs = [actor.close.remote() for actor in self.actors]
        ray.wait(refs, num_returns=len(refs), timeout=20.0)
        for actor in self.actors:
            ray.kill(actor)

    def _all(self, method: str, *args: Any, timeout: float = 0.0) -> list[Any]:
        refs = [actor.call.remote(method, *args) for actor in self.actors]
        return self._crew.wait(refs, method, timeout)


# More than an engine's scheduler runs at once (on CPUs vLLM's max_num_seqs is 256 where nobody sets it), so that it
# never starves, and few enough that a late engine can still be given less.
_SEQUENCES_IN_FLIGHT = 512
_CHECK_S = 5.0
