"""vLLM's engine core under a thread of its own, for one event loop.

vLLM's AsyncLLM wakes the event loop at every step of the core, and has the core in a process of its own, which imports
vLLM once more. Here the same parts are put together as in its LLMEngine (vllm/v1/engine/llm_engine.py): a thread steps
the core, and crosses to the event loop when requests are finished, once for all that finished in a step. The core is in
this process where `VLLM_ENABLE_V1_MULTIPROCESSING` is 0, else in a child process.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from stare_megatron.inference.load import LoadMeter

T = TypeVar("T")

_GRACE_S = 5.0
_WATCH_S = 0.5


def import_vllm() -> None:
    """What the start of a `FrontEnd` imports, seconds of it. Nothing of it touches a GPU."""
    for name in ("engine.arg_utils", "renderers", "v1.engine.core_client", "v1.engine.output_processor", "v1.executor"):
        importlib.import_module(f"vllm.{name}")


@dataclass(frozen=True)
class _Request:
    """A request on its way into the core, and where its output is awaited."""

    prompt: Any
    params: SamplingParams
    id: str
    priority: int
    done: asyncio.Future[RequestOutput]


@dataclass(frozen=True)
class Drawn:
    """What has been drawn of a request: tokens, their log-probs, and where each weight version begins among them."""

    token_ids: list[int]
    logprobs: list[float]
    starts: list[tuple[str, int]]


class FrontEnd:
    """An engine core that runs. Its methods are those of AsyncLLM, by the same names; use them from one event loop.

    Args:
        meter: is told of every step.
    """

    def __init__(self, meter: LoadMeter) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        self._loop = asyncio.get_running_loop()
        self._meter = meter
        self._new: list[_Request] = []
        self._adding: Sequence[_Request] = ()
        self._finished: list[tuple[asyncio.Future[RequestOutput], RequestOutput | Exception]] = []
        self._paused = self._stepping = self._dead = self._closed = False
        self._error = EngineDeadError
        self._refusals = (ValueError, TypeError, VLLMClientError)
        self._thread = ThreadPoolExecutor(1, "engine-core")

    async def start(self, args: Mapping[str, Any]) -> None:
        """Load the model. `args`: vLLM's EngineArgs.

        Raises:
            RuntimeError: vLLM refuses the model or the settings, or its process dies.
        """
        started = asyncio.wrap_future(self._submit(lambda: self._start(args)))
        await asyncio.wait([started])
        error = started.exception()
        if isinstance(error, Exception):  # of vLLM and all the libraries it loads a model with
            traceback.print_exception(error)  # to the engine's log: an error that crosses processes has none
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        started.result()

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """The finished output of a request; one that is cancelled is taken back.

        Raises:
            ValueError, VLLMClientError: vLLM refuses it. EngineDeadError: the core failed.
        """
        if self._dead:
            raise self._error()
        request = _Request(prompt, params, request_id, priority, self._loop.create_future())
        self._new.append(request)
        if len(self._new) == 1:  # those that are made in the same turn of the loop go together
            self._loop.call_soon(self._hand_over)
        try:
            yield await request.done
        finally:
            if request.done.cancelled() and not self._dead:
                self._submit(lambda: self._abort([request_id]))

    async def pause_generation(self, *, mode: str = "keep", clear_cache: bool = False) -> None:
        """Stop after the current step. Requests in flight wait, and so do new ones."""

        def pause() -> None:
            self._utility("pause_scheduler", mode, clear_cache)
            self._paused = True

        await self._call(pause)

    async def resume_generation(self) -> None:
        def resume() -> None:
            self._utility("resume_scheduler")
            self._paused = False
            self._go_on()

        await self._call(resume)

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return await self._call(lambda: self._core.reset_prefix_cache(reset_running_requests))

    async def sleep(self, level: int, mode: str) -> None:
        def sleep() -> None:
            self._utility("sleep", level, mode)
            self._paused = True

        await self._call(sleep)

    async def wake_up(self, tags: list[str]) -> None:
        """Take memory back; when all of it is, generation goes on."""

        def wake() -> None:
            self._paused = not self._core.wake_up(tags)
            self._go_on()

        await self._call(wake)

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = (), **kwargs: Any) -> list[Any]:
        """A method of every worker."""
        return await self._call(lambda: self._core.collective_rpc(method, None, args, kwargs))

    async def init_weight_transfer_engine(self, request: WeightTransferInitRequest) -> None:
        await self.collective_rpc("init_weight_transfer_engine", init_info=request.init_info)

    async def start_weight_update(self) -> None:
        await self.collective_rpc("start_weight_update")

    async def update_weights(self, request: WeightTransferUpdateRequest) -> None:
        await self.collective_rpc("update_weights", update_info=request.update_info)

    async def finish_weight_update(self, weight_version: str) -> None:
        await self.collective_rpc("finish_weight_update")
        await self.update_weight_version(weight_version)

    async def update_weight_version(self, new_version: str) -> None:
        await self._call(lambda: self._core.set_weight_version(new_version))

    async def answer(self) -> None:
        """Returns when the core answers, between two steps."""
        await self._call(lambda: self._utility("is_sleeping"))

    async def drawn(self) -> dict[str, Drawn]:
        """Of every request that is in the core and not finished, by its id; none that have no token yet."""
        return await self._call(self._drawn)

    def shutdown(self) -> None:
        """End the core. A step or a call that goes on gets a few seconds to end. Harmless when repeated."""
        if self._closed:
            return
        self._closed = self._dead = True
        wait([self._thread.submit(int)], _GRACE_S)
        self._thread.shutdown(wait=False, cancel_futures=True)
        if "_core" in vars(self):
            self._outputs.propagate_error(self._error())
            self._finished += [(request.done, self._error()) for request in self._new]
            _settle(self._finished)
            self._core.shutdown()
            self._renderer.shutdown()

    async def _call(self, call: Callable[[], T]) -> T:
        """What `call` returns in the core's thread."""
        return await asyncio.wrap_future(self._submit(call))

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        if self._dead:
            raise self._error()
        return self._thread.submit(call)

    def _hand_over(self) -> None:
        new, self._new = self._new, []
        if self._dead:
            _settle([(request.done, self._error()) for request in new])
        else:
            self._submit(lambda: self._add_all(new)).add_done_callback(self._ended)

    # ---- in the thread

    def _start(self, args: Mapping[str, Any]) -> None:
        from vllm import envs
        from vllm.engine.arg_utils import EngineArgs
        from vllm.renderers import renderer_from_config
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.core_client import EngineCoreClient, InprocClient
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.executor import Executor

        # Batches as large as in a program that only samples: twice those of vLLM's other contexts, on CPUs.
        config: VllmConfig = EngineArgs(**args).create_engine_config(UsageContext.LLM_CLASS)
        self._renderer = renderer_from_config(config)
        self._inputs = InputProcessor(config, self._renderer)
        self._outputs = OutputProcessor(
            self._renderer.tokenizer, log_stats=False, stream_interval=config.scheduler_config.stream_interval
        )
        self._core = EngineCoreClient.make_client(
            multiprocess_mode=envs.VLLM_ENABLE_V1_MULTIPROCESSING,
            asyncio_mode=False,
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=True,
            renderer=self._renderer,
        )
        if not isinstance(self._core, InprocClient):
            client = cast("SyncMPClient", self._core)
            threading.Thread(target=_report_death, args=(client, self._error), name="core-watch", daemon=True).start()
        self._tasks = self._core.get_supported_tasks()

    def _add_all(self, requests: Sequence[_Request]) -> None:
        self._adding = requests
        for request in requests:
            try:
                self._add(request)
            except self._refusals as e:  # of this one alone
                self._finished.append((request.done, e))
        self._adding = ()
        self._deliver()
        self._go_on()

    def _add(self, request: _Request) -> None:
        made = self._inputs.process_inputs(
            request.id, request.prompt, request.params, priority=request.priority, supported_tasks=self._tasks
        )
        self._inputs.assign_request_id(made)
        collector = cast("RequestOutputCollector", _Collector(self._finished, request.done))
        self._outputs.add_request(made, None, None, 0, collector)
        self._core.add_request(made)

    def _abort(self, request_ids: Sequence[str]) -> None:
        self._core.abort_requests(self._outputs.abort_requests(request_ids, internal=False))
        self._deliver()

    def _go_on(self) -> None:
        """Step again, if there is something to step, after the calls that wait."""
        if not (self._stepping or self._paused or self._dead) and self._outputs.has_unfinished_requests():
            self._stepping = True
            self._thread.submit(self._step).add_done_callback(self._ended)

    def _step(self) -> None:
        made = self._core.get_output()
        done = self._outputs.process_outputs(made.outputs, made.timestamp, None, made.weight_version)
        self._core.abort_requests(done.reqs_to_abort)  # those that a stop string ended
        self._meter.record(made)
        self._deliver()
        self._stepping = False
        self._go_on()

    def _drawn(self) -> dict[str, Drawn]:
        """Of vLLM's output processor, between two steps: it has the finished output of a request from there as well."""
        from vllm.logprobs import FlatLogprobs

        found: dict[str, Drawn] = {}
        for state in self._outputs.request_states.values():
            tokens = state.detokenizer.output_token_ids if state.detokenizer else []
            table = state.logprobs_processor.logprobs if state.logprobs_processor else None
            if tokens and isinstance(table, FlatLogprobs) and len(table.logprobs) == len(tokens):
                drawn = Drawn(list(tokens), list(table.logprobs), list(state.weight_version_starts))
                found[state.external_req_id] = drawn
        return found

    def _ended(self, step: Future[None]) -> None:
        """Whatever a step ended with, nothing is sampled any more."""
        if not step.cancelled() and (error := step.exception()):
            traceback.print_exception(error)
            self._dead = True
            self._outputs.propagate_error(self._error())
            self._finished += [(request.done, self._error()) for request in self._adding]
            self._deliver()

    def _deliver(self) -> None:
        if self._finished:
            self._loop.call_soon_threadsafe(_settle, self._finished[:])
            self._finished.clear()

    def _utility(self, method: str, *args: Any) -> None:
        """A method of the core that vLLM's clients have under no common name."""
        from vllm.v1.engine.core_client import InprocClient

        if isinstance(self._core, InprocClient):
            getattr(self._core.engine_core, method)(*args)
        else:
            cast("SyncMPClient", self._core).call_utility(method, *args)


class _Collector:
    """In the place of vLLM's own: keeps the finished output of a request for the end of the step."""

    def __init__(
        self,
        finished: list[tuple[asyncio.Future[RequestOutput], RequestOutput | Exception]],
        done: asyncio.Future[RequestOutput],
    ) -> None:
        self._finished = finished
        self._done = done

    def put(self, output: RequestOutput | Exception) -> None:
        if isinstance(output, Exception) or output.finished:
            self._finished.append((self._done, output))


def _report_death(client: SyncMPClient, error: type[Exception]) -> None:
    """Once the core's process has ended, end the waiting for its outputs and answers: vLLM's synchronous client notes
    the end, and leaves those who wait."""
    while not client.resources.engine_dead:
        time.sleep(_WATCH_S)
    client.outputs_queue.put_nowait(error())
    for future in list(client.utility_results.values()):
        if not future.done():
            cast("Future[Any]", future).set_exception(error())


def _settle(results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for done, result in results:
        if done.done():  # cancelled
            continue
        if isinstance(result, BaseException):
            done.set_exception(result)
        else:
            done.set_result(result)
