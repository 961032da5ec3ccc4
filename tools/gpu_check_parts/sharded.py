"""Part `sharded`: sharded pushes from a trainer rank into other processes that use the same GPU.

The rank is Megatron-Core's, offloaded between pushes, where that is installed, else what one would hold; the receivers
are one that keeps every tensor as it comes, and vLLM's own worker where that is installed, on a GPU asleep between
pushes. With two GPUs the first receiver is also on the second one, behind NCCL.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import HashStore

from stare_megatron.errors import RunError
from stare_megatron.host import copies, device
from stare_megatron.models.boxes import Box
from stare_megatron.sync.check import first_difference
from stare_megatron.sync.fanout import EngineFanOut
from stare_megatron.sync.link import nccl_group
from stare_megatron.sync.sharded import ShardedPusher
from stare_megatron.sync.source import ParamSpec
from stare_megatron.sync.wire import host_store
from tools.gpu_check_parts import models, push_receivers
from tools.gpu_check_parts.outcome import Context, Outcome

_PUSHES = 4
_NAME = "engine 0"


class Rank(Protocol):
    """`advance` gives it other weights; `at_hand`: within, `holdings` have their values; `away` after a push."""

    @property
    def specs(self) -> Sequence[ParamSpec]: ...
    def holdings(self) -> Iterator[tuple[Box, torch.Tensor]]: ...
    def advance(self, number: int) -> None: ...
    def at_hand(self) -> contextlib.AbstractContextManager[None]: ...
    def away(self) -> None: ...


def check(context: Context) -> Outcome:
    outcome = Outcome()
    shape = models.QWEN2_5_1_5B if context.on_gpu else models.SMALL
    model = context.shared / ("qwen2.5-1.5b" if context.on_gpu else "small-bf16")
    models.make(shape, model, on=context.device, dtype=torch.bfloat16)
    copies.release_cache()
    has_megatron = importlib.util.find_spec("megatron") is not None
    rank: Rank = push_receivers.MegatronRank(model) if has_megatron else push_receivers.LaidOut(model, context.device)
    outcome.numbers["rank"] = "Megatron-Core's" if has_megatron else "as one would hold it"
    rank.away()
    places = {"a receiver": ("plain", f"{context.device}:0")}
    if context.on_gpu and torch.cuda.device_count() > 1:
        places["a receiver on another GPU"] = ("plain", "cuda:1")
    if importlib.util.find_spec("vllm") is not None:
        places["vLLM's worker"] = ("vllm", f"{context.device}:0")
    for title, (kind, where) in places.items():
        with _kept(outcome, title):
            outcome.numbers[title] = _pushes(outcome, rank, Receiver(kind, model, where), title)
    with _kept(outcome, "a receiver that ends"):
        _death(outcome, rank, Receiver("plain", model, f"{context.device}:0"))
    if context.on_gpu:
        with _kept(outcome, "NCCL's group"):
            nccl_group(HashStore(), 0, 1).abort()
            outcome.numbers["NCCL's group"] = "made and aborted"
    return outcome


@contextlib.contextmanager
def _kept(outcome: Outcome, title: str) -> Iterator[None]:
    """What fails within does not take the numbers of the others with it."""
    try:
        yield
    except (RunError, RuntimeError, OSError) as e:
        traceback.print_exc()
        outcome.fail(f"{title}: {type(e).__name__}: {e}")


class Receiver:
    """The other process."""

    def __init__(self, kind: str, model: Path, where: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=push_receivers.serve, args=(theirs, kind, str(model), where), daemon=True)
        with _environment(device.engine_environment()):
            self.process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises: RuntimeError: it has ended."""
        try:
            self._pipe.send((method, arguments))
            return self._pipe.recv()
        except (EOFError, OSError) as e:
            raise RuntimeError(f"the receiver ended in {method}; its error is above") from e

    def fan_out(self) -> EngineFanOut:
        def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
            self.call(method, *arguments[0])

        return EngineFanOut([1], call)

    def close(self) -> None:
        self._pipe.close()
        self.process.join(20)
        self.process.kill()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _joined(rank: Rank, receiver: Receiver) -> ShardedPusher:
    with rank.at_hand():
        pusher = ShardedPusher(0, 1, rank.specs, rank.holdings, host_store("127.0.0.1"), "127.0.0.1")
    pusher.connect({_NAME: receiver.fan_out()})
    return pusher


def _pushes(outcome: Outcome, rank: Rank, receiver: Receiver, title: str) -> dict[str, Any]:
    names = [spec.name for spec in rank.specs]
    found: dict[str, Any] = {}
    seconds, left, sent = [], [], 0
    try:
        pusher = _joined(rank, receiver)
        (carrier,) = {c for engine in pusher._engines.values() for c in engine.carriers}
        for number in range(_PUSHES):
            rank.advance(number)
            receiver.call("wake")
            with rank.at_hand():
                began = time.perf_counter()
                sent = pusher.push(number)
                seconds.append(time.perf_counter() - began)
                ours = pusher.sums(names)
            rank.away()
            left.append(copies.allocated_bytes() / 2**20)
            theirs = receiver.call("sums")
            differs = first_difference(ours, theirs)
            outcome.require(differs is None, f"{title}, push {number}: {differs} differs")
            outcome.require(ours.keys() == theirs.keys(), f"{title}, push {number}: other tensors than were sent")
            receiver.call("sleep")
        found["receiver's MiB more in a push"] = receiver.call("grew") / 2**20
    finally:
        receiver.close()
    outcome.require(len(set(left[1:])) == 1, f"{title}: the rank keeps {left} MiB after its pushes")
    copied = _copy_seconds(sent, rank.specs[0].dtype)
    return found | {
        "carrier": carrier.name,
        "MiB": sent / 2**20,
        "seconds": seconds,
        "GB/s": sent / 1e9 / statistics.median(seconds[1:]),
        "share of a copy's rate": copied / statistics.median(seconds[1:]),
        "rank's MiB left after each push": left,
    }


def _copy_seconds(size: int, dtype: torch.dtype) -> float:
    """Of one warm copy of as much on this device, by pieces of 64 MiB."""
    where = torch.device("cuda" if device.current() is device.Device.CUDA else "cpu")
    a = torch.zeros(min(size, 64 << 20) // dtype.itemsize, dtype=dtype, device=where)
    b = torch.zeros_like(a)
    best = float("inf")
    for _ in range(5):
        copies.finish()
        began = time.perf_counter()
        b.copy_(a)
        copies.finish()
        best = min(best, time.perf_counter() - began)
    return best * size / a.nbytes


def _death(outcome: Outcome, rank: Rank, receiver: Receiver) -> None:
    """A receiver that ends in a push: the rank hears of it, and keeps nothing."""
    try:
        pusher = _joined(rank, receiver)
        before = copies.allocated_bytes()
        receiver.call("die")
        began = time.perf_counter()
        said = ""
        with rank.at_hand():
            try:
                pusher.push(0)
            except (RunError, RuntimeError) as e:
                said = str(e)
        rank.away()
        outcome.require(bool(said), "a push into a process that ended went well")
        outcome.numbers["a receiver that ends in a push"] = {
            "said": said,
            "seconds until the rank knew": time.perf_counter() - began,
            "rank's MiB more afterwards": (copies.allocated_bytes() - before) / 2**20,
        }
    finally:
        receiver.close()
