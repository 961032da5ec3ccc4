"""Sharded pushes of two ranks on two GPUs into workers on the same two, with a stand-in for CUDA and NCCL."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gpu_stand_in import Gpu

from stare_megatron.errors import RunError
from stare_megatron.models.boxes import Box
from stare_megatron.sync import receiver, sharded, wire
from stare_megatron.sync.fanout import EngineFanOut
from stare_megatron.sync.link import Link
from stare_megatron.sync.place import Carrier, Place
from stare_megatron.sync.receiver import Receiver
from stare_megatron.sync.sharded import ShardedPusher
from stare_megatron.sync.source import ParamSpec

ROWS, COLUMNS = 6, 5
NAMES = ("a", "b", "c")
HOST = torch.device("cpu")
here = threading.local()


class Worker:
    """Needs every tensor whole."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tensors = {name: torch.zeros(ROWS, COLUMNS) for name in NAMES}
        self.fails = False

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        store = wire.PrefixStore(info["name"], wire.join_store(info["host"], info["port"]))
        link = Link(store, info["name"], info["senders"] + self.number, info["senders"], info["workers"])
        needs = [Box(name, (0, 0), (ROWS, COLUMNS)) for name in NAMES]
        self.receiver = Receiver.join(link, self.number, needs, [], dtype=torch.float32, where=HOST)

    def update_weights(self, info: dict[str, Any]) -> None:
        def take(need: int, box: Box, value: torch.Tensor) -> None:
            rows, columns = (slice(b, e) for b, e in zip(box.begin, box.end, strict=True))
            self.tensors[NAMES[need]][rows, columns] = value
            if self.fails:
                self.receiver.link.close()
                raise RuntimeError("no room")

        self.receiver.receive(take)


class Engine:
    """Workers 0 and 1, on GPUs of the same number."""

    def __init__(self) -> None:
        self.workers = [Worker(0), Worker(1)]

    def fan_out(self) -> EngineFanOut:
        def one(worker: Worker, method: str, args: tuple[Any, ...]) -> None:
            here.gpu = worker.number
            vars(type(worker)).get(method, lambda *_: None)(worker, *args)

        def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda worker: one(worker, method, arguments[0]), self.workers))

        return EngineFanOut([2], call)


class Rank:
    """Rank r of two: the upper or the lower half of each tensor, and all of the last."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tensors = {name: torch.zeros(ROWS, COLUMNS) for name in NAMES}

    def holdings(self) -> Iterator[tuple[Box, torch.Tensor]]:
        half = ROWS // 2
        for name in NAMES[:-1]:
            begin = self.number * half
            yield Box(name, (begin, 0), (begin + half, COLUMNS)), self.tensors[name][begin : begin + half]
        yield Box(NAMES[-1], (0, 0), (ROWS, COLUMNS)), self.tensors[NAMES[-1]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    gpu.install(monkeypatch.setattr)
    for module in (sharded, receiver):
        monkeypatch.setattr(module, "place", lambda device: Place("one machine", f"GPU-{here.gpu}"))
    monkeypatch.setattr(sharded, "_CAUSE_S", 0.5)
    monkeypatch.setattr(sharded, "GPU_PUSH_BUCKET", 4 * COLUMNS * 2)  # two rows
    return gpu


def in_turn(work: Any) -> list[Any]:
    """`work(r)` of both ranks at once."""

    def on(rank: int) -> Any:
        here.gpu = rank
        return work(rank)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(on, range(2)))


def joined() -> tuple[list[Rank], Engine, list[ShardedPusher]]:
    specs = [ParamSpec(name, torch.float32, (ROWS, COLUMNS)) for name in NAMES]
    ranks, engine, store = [Rank(0), Rank(1)], Engine(), wire.host_store("127.0.0.1")

    def pusher(r: int) -> ShardedPusher:
        at = store if r == 0 else wire.join_store("127.0.0.1", store.port)
        return ShardedPusher(r, 2, specs, ranks[r].holdings, at, "127.0.0.1")

    pushers = in_turn(pusher)
    in_turn(lambda r: pushers[r].connect({"engine 0": engine.fan_out()}))
    return ranks, engine, pushers


def test_a_worker_that_fails_ends_the_push_on_all_ranks_and_they_give_their_buffers_back(gpu: Gpu) -> None:
    _, engine, pushers = joined()
    engine.workers[1].fails = True

    def push(r: int) -> str:
        with pytest.raises((RunError, RuntimeError)) as error:
            pushers[r].push(1)
        return str(error.value)

    said = in_turn(push)
    assert all("no room" in one or "engine 0 (worker 1) ended, or gave a push of weights up" in one for one in said)
    assert all(pusher._outbox._slots == [] for pusher in pushers)


def test_each_worker_reads_its_gpu_and_hears_of_the_other_by_nccl(gpu: Gpu) -> None:
    ranks, engine, pushers = joined()
    carriers = [pushers[r]._engines["engine 0"].carriers for r in range(2)]
    assert carriers == [(Carrier.IPC, Carrier.NCCL), (Carrier.NCCL, Carrier.IPC)]
    for version in (1, 2, 3):
        whole = {name: torch.randn(ROWS, COLUMNS) for name in NAMES}
        for rank in ranks:
            for name in NAMES:
                rank.tensors[name].copy_(whole[name])
        sent = in_turn(lambda r, version=version: pushers[r].push(version))
        assert sent == [2 * 2 * ROWS // 2 * COLUMNS * 4 + ROWS * COLUMNS * 4] * 2  # the last tensor to its own worker
        for worker in engine.workers:
            assert all(torch.equal(worker.tensors[name], whole[name]) for name in NAMES)
        assert gpu.in_use == 0
