"""The thread that steps vLLM's core: who waits for what. The core and vLLM's processors are stood in for here; the real
ones are in tests/e2e/test_engine.py."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import BackgroundResources, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.outputs import LogprobsLists
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from stare_megatron.inference import front_end
from stare_megatron.inference.front_end import FrontEnd
from stare_megatron.inference.load import LoadMeter


class Core:
    """Finishes each request after as many steps as its prompt says; notes how many were there at each step."""

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}
        self.collectors: dict[str, Any] = {}
        self.steps: list[int] = []
        self.asked: list[str] = []
        self.threads: set[int] = set()
        self.fails = False

    # ---- vLLM's InputProcessor

    def process_inputs(self, request_id: str, prompt: int, params: Any, priority: int, supported_tasks: Any) -> Any:
        if prompt < 1:
            raise VLLMValidationError("prompt < 1")
        return SimpleNamespace(id=request_id, steps=prompt)

    def assign_request_id(self, request: Any) -> None:
        pass

    # ---- its OutputProcessor and its core, which share the name of a method

    def add_request(self, request: Any, *more: Any) -> None:
        self.threads.add(threading.get_ident())
        self.requests[request.id] = request.steps
        if more:
            self.collectors[request.id] = more[-1]

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def get_output(self) -> Any:
        if self.fails:
            raise RuntimeError("no memory")
        self.steps.append(len(self.requests))
        self.requests = {name: left - 1 for name, left in self.requests.items()}
        done = [name for name, left in self.requests.items() if not left]
        drafts = SpecDecodingStats(4, num_drafts=2, num_draft_tokens=7, num_accepted_tokens=3)
        stats = SimpleNamespace(num_running_reqs=len(self.requests), kv_cache_usage=0.5, spec_decoding_stats=drafts)
        made = [SimpleNamespace(id=name, events=[SimpleNamespace(type=EngineCoreEventType.PREEMPTED)]) for name in done]
        return SimpleNamespace(outputs=made, timestamp=0.0, weight_version="1", scheduler_stats=stats)

    def process_outputs(self, outputs: Any, *_: Any) -> Any:
        for output in outputs:
            del self.requests[output.id]
            self.collectors[output.id].put(SimpleNamespace(finished=True, id=output.id))
        return SimpleNamespace(reqs_to_abort=[])

    def abort_requests(self, names: Any, internal: bool = False) -> list[str]:
        self.asked += names
        return [name for name in names if self.requests.pop(name, None)]

    def propagate_error(self, error: Exception) -> None:
        for name in self.requests:
            self.collectors[name].put(error)

    def call_utility(self, method: str, *args: Any) -> None:
        self.asked.append(method)

    def set_weight_version(self, version: str) -> None:
        self.asked.append(version)

    def shutdown(self) -> None:
        self.asked.append("shutdown")


async def started() -> tuple[FrontEnd, Core]:
    front, core = FrontEnd(LoadMeter()), Core()
    vars(front).update(_core=core, _inputs=core, _outputs=core, _renderer=SimpleNamespace(shutdown=int), _tasks=())
    return front, core


async def output(front: FrontEnd, steps: int, name: str) -> str:
    async for made in front.generate(steps, None, name):  # type: ignore[arg-type]
        return made.id  # type: ignore[attr-defined]
    raise AssertionError("nothing came")


def run(case: Callable[[FrontEnd, Core], Awaitable[None]]) -> Core:
    async def all_of() -> Core:
        front, core = await started()
        try:
            await asyncio.wait_for(case(front, core), 120)
        finally:
            front.shutdown()
        return core

    return asyncio.run(all_of())


def test_requests_of_one_turn_are_in_the_same_first_step() -> None:
    async def case(front: FrontEnd, core: Core) -> None:
        names = [f"r{i}" for i in range(50)]
        assert await asyncio.gather(*(output(front, 3, name) for name in names)) == names
        load = front._meter.take()
        assert (load.iterations, load.preemptions) == (3, 50)
        assert (load.drafts, load.tokens_drafted, load.tokens_accepted) == (6, 21, 9)

    core = run(case)
    assert core.steps == [50, 50, 50]
    assert len(core.threads) == 1
    assert threading.get_ident() not in core.threads


def test_a_refused_request_fails_alone() -> None:
    async def case(front: FrontEnd, core: Core) -> None:
        good, bad = await asyncio.gather(output(front, 2, "a"), output(front, 0, "b"), return_exceptions=True)
        assert good == "a"
        assert isinstance(bad, VLLMValidationError)

    run(case)


def test_a_pause_holds_requests_back_and_calls_still_run() -> None:
    async def case(front: FrontEnd, core: Core) -> None:
        await front.pause_generation()
        waiting = asyncio.ensure_future(output(front, 1, "a"))
        await front.update_weight_version("7")
        await asyncio.sleep(0.05)
        assert not core.steps
        await front.resume_generation()
        assert await waiting == "a"

    assert run(case).asked == ["pause_scheduler", "7", "resume_scheduler", "shutdown"]


def test_a_cancelled_request_is_taken_back() -> None:
    async def case(front: FrontEnd, core: Core) -> None:
        task = asyncio.ensure_future(output(front, 10**9, "long"))
        while not core.steps:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await output(front, 1, "next") == "next"
        assert "long" in core.asked

    run(case)


def test_a_failed_step_ends_all_requests_and_those_that_come(capsys: pytest.CaptureFixture[str]) -> None:
    async def case(front: FrontEnd, core: Core) -> None:
        core.fails = True
        both = await asyncio.gather(output(front, 2, "a"), output(front, 2, "b"), return_exceptions=True)
        assert [type(error) for error in both] == [EngineDeadError] * 2
        with pytest.raises(EngineDeadError):
            await output(front, 1, "c")
        with pytest.raises(EngineDeadError):
            await front.pause_generation()

    run(case)
    assert "no memory" in capsys.readouterr().err


def test_a_shutdown_ends_what_is_in_flight() -> None:
    async def case(front: FrontEnd, core: Core) -> None:
        tasks = [asyncio.ensure_future(output(front, 10**9, name)) for name in "ab"]
        while not core.steps:
            await asyncio.sleep(0.001)
        front.shutdown()
        both = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in both] == [EngineDeadError] * 2

    run(case)


def test_the_end_of_a_core_s_process_ends_all_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own client, as its monitor leaves it when the process has gone."""
    monkeypatch.setattr(front_end, "_WATCH_S", 0.01)
    client: Any = object.__new__(SyncMPClient)
    client.resources = BackgroundResources(ctx=None)  # type: ignore[arg-type]
    client.outputs_queue, client.utility_results = queue.Queue(), {}
    client._send_input = lambda *_: None
    with ThreadPoolExecutor(3) as pool:
        watch = pool.submit(front_end._report_death, client, EngineDeadError)
        waiting = [pool.submit(client.get_output), pool.submit(client.call_utility, "pause_scheduler", "keep", False)]
        time.sleep(0.1)
        assert not any(w.done() for w in waiting)
        client.resources.engine_dead = True
        watch.result(60)
        for one in waiting:
            with pytest.raises(EngineDeadError):
                one.result(60)


def test_it_answers_while_it_samples_and_says_when_it_is_gone() -> None:
    async def case(front: FrontEnd, core: Core) -> None:
        long = asyncio.ensure_future(output(front, 10**9, "a"))
        await asyncio.sleep(0)
        await front.answer()
        assert not long.done()
        core.fails = True
        with pytest.raises(EngineDeadError):
            await long
        with pytest.raises(EngineDeadError):
            await front.answer()

    assert "is_sleeping" in run(case).asked


def test_what_is_drawn_of_unfinished_requests_is_what_their_end_brings() -> None:
    """vLLM's own output processor, fed as its core would: tokens, log-probs and where versions begin, at every step."""
    params = SamplingParams(
        logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, max_tokens=5
    )
    processor, finished = OutputProcessor(None, log_stats=False), []
    for name in ("a", "b"):
        order = EngineCoreRequest(f"{name}-0", [1, 2], None, params, None, 0.0, None, None, None, external_req_id=name)
        future: Any = SimpleNamespace()
        processor.add_request(order, None, None, 0, front_end._Collector(finished, future))  # type: ignore[arg-type]

    async def made() -> FrontEnd:
        return FrontEnd(LoadMeter())

    front = asyncio.run(made())
    vars(front).update(_outputs=processor)
    assert front._drawn() == {}
    for step, version in enumerate(["3", "3", "4", "4", "6"]):
        token, logprob = np.array([[7 + step]]), np.array([[-0.5 * step]], np.float32)
        drawn = LogprobsLists(token, logprob, np.array([1]))
        end = FinishReason.LENGTH if step == 4 else None
        output = EngineCoreOutput("a-0", [7 + step], new_logprobs=drawn, finish_reason=end)
        processor.process_outputs([output], weight_version=version)
        found = front._drawn()
        assert list(found) == ([] if end else ["a"])  # the other one waits
        for drawn_of in found.values():
            assert drawn_of.token_ids == list(range(7, 8 + step))
            assert drawn_of.logprobs == [-0.5 * n for n in range(step + 1)]
            assert drawn_of.starts == [("3", 0), ("4", 2)][: 1 + (step > 1)]
    ((_, whole),) = finished
    assert list(whole.outputs[0].token_ids) == list(range(7, 12))
    assert list(whole.outputs[0].logprobs.logprobs) == [-0.5 * n for n in range(5)]
    assert [(s.version, s.start) for s in whole.outputs[0].weight_versions] == [("3", 0), ("4", 2), ("6", 4)]
