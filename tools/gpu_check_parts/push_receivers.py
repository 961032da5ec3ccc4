"""Both sides of part `sharded`: what a rank holds, and the processes that receive it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from stare_megatron.host import copies, device
from stare_megatron.host.ports import free_port
from stare_megatron.models.boxes import Box
from stare_megatron.models.families import read_hf_config
from stare_megatron.sync.check import box_sum
from stare_megatron.sync.link import Link
from stare_megatron.sync.receiver import Receiver
from stare_megatron.sync.sharded import label
from stare_megatron.sync.source import ParamSpec
from stare_megatron.sync.wire import PrefixStore, join_store

ALL = ["gradients", "optimizer", "parameters"]


class MegatronRank:
    """A trainer rank, all of whose state is away between pushes."""

    def __init__(self, model: Path) -> None:
        from tools.bench_trainer import make_rank
        from tools.gpu_check_parts.one_rank import as_torchrun, configuration

        as_torchrun()
        self._config = configuration(model, "bfloat16", offload=ALL)
        self._trainer = make_rank(self._config)
        self.specs = [ParamSpec(*meta) for meta in self._trainer.weight_metadata()]

    def holdings(self) -> Iterator[tuple[Box, torch.Tensor]]:
        return self._trainer.holdings()

    def advance(self, number: int) -> None:
        """An update."""
        from stare_megatron.types import Control
        from tools.bench_trainer import load

        self._trainer.to_device()
        load(self._trainer, self._config, number)
        entropy = self._trainer.score().entropy
        self._trainer.update(Control(True, 1.1, 0.9, entropy, entropy + 1.0))

    def at_hand(self) -> contextlib.AbstractContextManager[None]:
        return self._trainer.parameters_at_hand()

    def away(self) -> None:
        self._trainer.to_host()


class LaidOut:
    """The parameters a rank alone would have, without one."""

    def __init__(self, model: Path, where: str) -> None:
        from tools.bench_push import Rank

        self._rank = Rank(read_hf_config(model), where)
        self.specs = self._rank.specs

    def holdings(self) -> Iterator[tuple[Box, torch.Tensor]]:
        return self._rank.holdings()

    def advance(self, number: int) -> None:
        for _, view in self.holdings():
            view.copy_(torch.randn(view.shape, device=view.device) * 0.02)

    def at_hand(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def away(self) -> None:
        copies.release_cache()


class Plain:
    """A worker that needs every tensor whole, and keeps it. Nothing of vLLM."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._dies = False

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        dtype = torch.__dict__[info["dtype_name"]]
        specs = [ParamSpec(n, dtype, tuple(s)) for n, s in zip(info["names"], info["shapes"], strict=True)]
        self._needs = [Box(spec.name, (0,) * len(spec.shape), spec.shape) for spec in specs]
        self._tensors = [torch.zeros(spec.shape, dtype=dtype, device=self._where) for spec in specs]
        store = PrefixStore(info["name"], join_store(info["host"], info["port"]))
        link = Link(store, info["name"], info["senders"], info["senders"], info["workers"])
        self._receiver = Receiver.join(link, 0, self._needs, [], dtype=dtype, where=self._where)

    def start_weight_update(self) -> None: ...

    def update_weights(self, info: dict[str, Any]) -> None:
        self._receiver.receive(self._take)

    def _take(self, need: int, box: Box, value: torch.Tensor) -> None:
        self._tensors[need][box.within(self._needs[need])].copy_(value)
        if self._dies:
            os._exit(1)

    def finish_weight_update(self) -> None: ...

    def sums(self) -> dict[str, int]:
        pairs = zip(self._needs, self._tensors, strict=True)
        return {label(need, 0): box_sum(tensor, need, tensor.shape) for need, tensor in pairs}

    def die(self) -> None:
        """In the next push."""
        self._dies = True

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


def vllm_worker(model: str, on_gpu: bool, **settings: Any) -> tuple[Any, Any]:
    """vLLM's worker, with random weights, and its VllmConfig. `settings`: further EngineArgs."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    from stare_megatron.sync.plugin import register

    register()
    where: dict[str, Any] = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.3} if on_gpu else {}
    config = EngineArgs(
        model=model,
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=1 << 20,
        **settings,
        **where,
    ).create_engine_config()
    if on_gpu:
        from vllm.v1.worker.gpu_worker import Worker
    else:
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    with set_current_vllm_config(config):
        worker: Any = Worker(config, 0, 0, f"tcp://127.0.0.1:{free_port()}", is_driver_worker=True)
        worker.init_device()
        worker.load_model()
    return worker, config


class Vllm:
    """vLLM's worker with a model of its own, whose weights are random until a push."""

    def __init__(self, model: str, on_gpu: bool) -> None:
        self._worker, _ = vllm_worker(model, on_gpu, weight_transfer_config={"backend": "sharded"})
        self._on_gpu, self._asleep = on_gpu, False
        self.init_weight_transfer_engine = self._worker.init_weight_transfer_engine
        self.start_weight_update = self._worker.start_weight_update
        self.update_weights = self._worker.update_weights

    def finish_weight_update(self) -> None:
        self._worker.finish_weight_update()

    def sums(self) -> dict[str, int]:
        return self._worker.weight_transfer_engine.sums(())

    def sleep(self) -> None:
        """Level 2: the weights are given up."""
        if self._on_gpu:
            self._worker.sleep(2)
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._worker.wake_up(["weights"])
            self._asleep = False


def serve(pipe: Connection, kind: str, model: str, where: str) -> None:
    """The receiver's process: each order is a method and its arguments. An error ends it."""
    place = torch.device(where)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    torch.set_num_threads(1)
    receiver = Plain(place) if kind == "plain" else Vllm(model, place.type == "cuda")
    grew = 0
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        answer: Any = None
        if method == "grew":
            answer = grew
        elif method == "sums":
            answer = {name: f"{value & (1 << 64) - 1:016x}" for name, value in receiver.sums().items()}
        elif method == "update_weights":
            grew = _peak_of(functools.partial(receiver.update_weights, *arguments))
        elif method == "init_weight_transfer_engine":
            receiver.init_weight_transfer_engine(*arguments)
        else:
            getattr(receiver, method)()
        pipe.send(answer)


def _peak_of(work: Callable[[], None]) -> int:
    """Most that this process's tensors took of the GPU beyond what they did before; 0 on a CPU."""
    if device.current() is not device.Device.CUDA:
        work()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before
