"""Weights pushed from this process (the trainer) into real, running vLLM engines over gloo."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from stare_megatron.config import InferenceConfig
from stare_megatron.errors import RunError
from stare_megatron.models.boxes import Box
from stare_megatron.sync.check import checksum, compare, first_difference, require_agreement
from stare_megatron.sync.fanout import EngineFanOut
from stare_megatron.sync.push import WeightPusher
from stare_megatron.sync.sharded import ShardedPusher
from stare_megatron.sync.source import ParamSpec, WeightStream
from stare_megatron.sync.wire import host_store
from stare_megatron.types import Completion, Sampling
from tests.e2e.engine_process import EngineProcess
from tests.e2e.tiny_qwen2 import make_model, reference_logprobs, save, weights

WINDOW = 256
PROBE = np.random.default_rng(1).integers(3, 112, 100)
PROMPT = [int(t) for t in np.random.default_rng(2).integers(3, 112, 70)]  # two full blocks of 32 and a rest
SAMPLING = Sampling(max_tokens=8, temperature=1.0, top_p=1.0, stop=(), seed=3)

pytestmark = pytest.mark.timeout(900)


class Trainer:
    """This process in the part of trainer rank 0; `state` is what a push sends."""

    def __init__(self, engines: Sequence[EngineProcess], workers: int, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        specs = tuple(ParamSpec(n, t.dtype, tuple(t.shape)) for n, t in state.items())
        stream = WeightStream(specs, lambda: iter(self.state.items()))

        def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
            futures = [e.submit(method, *a) for e, a in zip(engines, arguments, strict=True)]
            for future in futures:
                future.result(200)

        client = EngineFanOut([workers] * len(engines), call)
        self.pusher = WeightPusher("gloo", 0, stream, client, "127.0.0.1")
        self.pusher.connect()
        self.engines = engines
        self.versions: Iterator[int] = itertools.count(1)

    def push(self, state: dict[str, torch.Tensor]) -> int:
        self.state = state
        version = next(self.versions)
        self.pusher.push(version)
        return version


def start(folder: Path, count: int, tensor_parallel: int = 1, transport: str = "gloo") -> list[EngineProcess]:
    # Small blocks, so that short prompts are cached.
    config = InferenceConfig(engines=count, tensor_parallel=tensor_parallel, vllm={"block_size": 32})
    engines = [EngineProcess(f"engine {i}", folder, "float32", config, WINDOW, 0, transport) for i in range(count)]
    try:
        for future in [e.submit("start") for e in engines]:
            future.result(400)
    except BaseException:
        stop(engines)
        raise
    return engines


class ShardingTrainer:
    """This process in the part of the only trainer rank, which sends engines what they need."""

    def __init__(self, engines: Sequence[EngineProcess], workers: int, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        self._specs = [ParamSpec(n, t.dtype, tuple(t.shape)) for n, t in state.items()]
        store = host_store("127.0.0.1")
        self.pusher = ShardedPusher(0, 1, self._specs, self._holdings, store, "127.0.0.1")
        self.pusher.connect({f"engine {i}": self._client(e, workers) for i, e in enumerate(engines)})
        self.engines = engines

    def _holdings(self) -> Iterator[tuple[Box, torch.Tensor]]:
        for spec in self._specs:
            yield Box(spec.name, (0,) * len(spec.shape), spec.shape), self.state[spec.name]

    def _client(self, engine: EngineProcess, workers: int) -> EngineFanOut:
        def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
            engine.submit(method, *arguments[0]).result(200)

        return EngineFanOut([workers], call)


def stop(engines: list[EngineProcess]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(EngineProcess.stop, engines))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Two engines with a tied LM head and one trainer."""
    model = make_model(tied=True, seed=0)
    engines = start(save(model, tmp_path_factory.mktemp("tied")), 2)
    try:
        yield Trainer(engines, 1, weights(model))
    finally:
        stop(engines)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """One engine of two tensor-parallel workers, untied."""
    model = make_model(tied=False, seed=0)
    engines = start(save(model, tmp_path_factory.mktemp("untied")), 1, tensor_parallel=2)
    try:
        yield Trainer(engines, 2, weights(model))
    finally:
        stop(engines)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.runs), False])
def test_engines_follow_what_is_sent_in_shards(tied: bool, tmp_path: Path) -> None:
    """Two engines with a tied head, then one of two workers."""
    count, workers = (2, 1) if tied else (1, 2)
    engines = start(save(make_model(tied, seed=0), tmp_path), count, workers, "sharded")
    try:
        trainer = ShardingTrainer(engines, workers, weights(make_model(tied, seed=0)))
        for version in (1, 2):
            model = make_model(tied, seed=version)
            trainer.state = weights(model)
            order = Sampling(max_tokens=100, temperature=1.0, top_p=1.0, stop=(), seed=0)
            flying = [engines[0].submit("sample", PROMPT, order) for _ in range(8)]
            trainer.pusher.push(version)
            mine = trainer.pusher.sums(set(trainer.state))
            for engine in engines:
                assert_engine_is(engine, model)
                assert engine.call("sample", PROMPT, SAMPLING).weight_version == version
                theirs = engine.call("checksums")
                assert theirs.keys() == mine.keys()
                assert first_difference(mine, theirs) is None
            assert all(len(f.result(200).token_ids) for f in flying)
    finally:
        stop(engines)


def assert_engine_is(engine: EngineProcess, model: Any) -> None:
    np.testing.assert_allclose(engine.call("logprobs", PROBE), reference_logprobs(model, PROBE), atol=1e-4)


@pytest.mark.parametrize("which", ["tied", "sharded"])
def test_logprobs_follow_the_pushed_weights(which: str, request: pytest.FixtureRequest) -> None:
    trainer: Trainer = request.getfixturevalue(which)
    for engine in trainer.engines:
        assert_engine_is(engine, make_model(which == "tied", seed=0))
        assert engine.call("sample", PROMPT, SAMPLING).weight_version == -1
    for seed in (1, 2):
        model = make_model(which == "tied", seed)
        gap = np.abs(trainer.engines[0].call("logprobs", PROBE) - reference_logprobs(model, PROBE)).mean()
        assert gap > 0.1  # the old weights are told from the new ones
        version = trainer.push(weights(model))
        mine = {name: checksum(t) for name, t in weights(model).items()}
        for engine in trainer.engines:
            assert_engine_is(engine, model)
            assert engine.call("sample", PROMPT, SAMPLING).weight_version == version
            theirs = engine.call("checksums")
            assert set(theirs) == set(mine)
            assert first_difference(mine, theirs) is None


def test_prefix_cache_is_dropped(tied: Trainer) -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(max_tokens=4, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    engine = tied.engines[0]

    def cached() -> int:
        return engine.call("_generate", PROMPT, params).num_cached_tokens

    tied.push(weights(make_model(True, seed=3)))
    cached()
    assert cached() == 64  # so the cache is in use, and a stale one would be used, too
    model = make_model(True, seed=4)
    tied.push(weights(model))
    completion = engine.call("sample", PROMPT, SAMPLING)
    expected = reference_logprobs(model, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    tied.push(weights(model))
    assert cached() == 0


def test_requests_in_flight_go_on_with_the_new_weights(tied: Trainer) -> None:
    old, new = make_model(True, seed=5), make_model(True, seed=6)
    before = tied.push(weights(old))
    flying: list[Future[Completion]] = []
    pushed = threading.Event()

    def submit(_: object = None) -> None:  # one for one that ends: some are under way whenever the push comes
        if not pushed.is_set():
            order = Sampling(max_tokens=150, temperature=1.0, top_p=1.0, stop=(), seed=len(flying))
            flying.append(tied.engines[0].submit("sample", PROMPT, order))
            flying[-1].add_done_callback(submit)

    for _ in range(40):
        submit()
    after = tied.push(weights(new))
    pushed.set()
    completions = [f.result(200) for f in flying]
    assert {c.weight_version for c in completions} <= {before, after}
    assert_engine_is(tied.engines[0], new)
    # A context computed anew under the new weights gives their log-probs at the end of what they went on with.
    through = [c for c in completions if (c.versions[0][0], c.versions[-1][0]) == (before, after)]
    c = max(through, key=lambda c: len(c.token_ids))
    expected = reference_logprobs(new, [*PROMPT, *c.token_ids])[len(PROMPT) - 1 :]
    np.testing.assert_allclose(c.logprobs[-1], expected[-1], atol=1e-4)


def test_a_corrupted_parameter_is_named(tied: Trainer) -> None:
    model = make_model(True, seed=7)
    state = weights(model)
    name = "model.layers.1.mlp.up_proj.weight"
    corrupted = state[name].clone()
    corrupted[[4, 9]] = corrupted[[9, 4]]  # same values, wrong places
    corrupted[4:9] *= 1.5
    version = tied.push(state | {name: corrupted})
    mine = {n: checksum(t) for n, t in state.items()}
    engine = tied.engines[1]
    agreement = compare(engine.call("logprobs", PROBE), reference_logprobs(model, PROBE))
    with pytest.raises(RunError, match=f"version {version}.*'{name}'"):
        require_agreement(
            "engine 1", version, agreement, 1e-3, lambda: first_difference(mine, engine.call("checksums"))
        )


def test_a_failing_export_ends_the_push_on_both_sides(sharded: Trainer) -> None:
    """Ruins its engine: last to use it."""

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from itertools.islice(weights(make_model(False, seed=0)).items(), 3)
        raise RunError("the export failed")

    class Broken(dict[str, torch.Tensor]):
        def items(self) -> Any:
            return broken()

    with pytest.raises(RunError, match="the export failed"):
        sharded.push(Broken())
    with pytest.raises(Exception, match="without a matching start"):  # the engine, too, gave the update up
        sharded.engines[0].call("finish_weight_update", 9)


def test_a_killed_parent_takes_the_workers_along(sharded: Trainer) -> None:
    """Ruins its engine: last to use it."""
    engine = sharded.engines[0]
    children = engine.descendants()
    assert children
    maps = [line for p in children for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines()]
    buffers = [line for line in maps if "cpushm" in line]
    assert buffers
    assert all(line.endswith("(deleted)") for line in buffers), "they would be left in /dev/shm"
    assert engine.process.pid is not None
    psutil.Process(engine.process.pid).send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive
