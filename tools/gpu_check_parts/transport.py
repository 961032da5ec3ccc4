"""Part `transport`: a push between two processes by the project's sender, vLLM's encoding and the engine's receiver.

On a GPU over CUDA IPC, a tensor larger than vLLM's buffer among them; on a CPU over gloo.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

import torch

from stare_megatron.host import device
from stare_megatron.sync.check import checksum
from stare_megatron.sync.fanout import EngineFanOut
from stare_megatron.sync.push import WeightPusher
from stare_megatron.sync.source import ParamSpec, WeightStream
from tools.gpu_check_parts.outcome import Context, Outcome, skipped

_PUSHES = 3
_ANSWER_S = 60.0  # the first one takes a start of vLLM's modules
# The embedding of a 7B model is larger than 1 GiB.
_ON_GPU = {"embed": (151_936, 3584), "up": (18_944, 3584), "down": (3584, 18_944), "norm": (3584,)}
_ON_CPU = {"embed": (1000, 64), "up": (192, 64), "down": (64, 192), "norm": (64,)}


def check(context: Context) -> Outcome:
    if importlib.util.find_spec("vllm") is None:
        return skipped("vLLM is not installed, whose transfer engines carry the weights")
    transport = device.weight_transport(colocated=True)
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    receiver = spawn.Process(target=receive, args=(theirs, transport, context.device), daemon=True)
    receiver.start()
    theirs.close()
    outcome = Outcome(numbers={"transport": transport})
    try:
        _push(outcome, context, transport, mine, receiver)
    finally:
        mine.close()
        receiver.join(10)
        receiver.kill()
    return outcome


def _push(outcome: Outcome, context: Context, transport: str, pipe: Connection, receiver: BaseProcess) -> None:
    state: dict[str, torch.Tensor] = {}
    shapes = _ON_GPU if context.on_gpu else _ON_CPU
    specs = tuple(ParamSpec(name, torch.bfloat16, shape) for name, shape in shapes.items())

    def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> Any:
        (sent,) = arguments
        pipe.send((method, _encoded(sent)))
        try:
            if not pipe.poll(_ANSWER_S):
                receiver.kill()  # whoever sends to it is told by the end of its connections
                raise RuntimeError(f"the receiver did not answer {method} within {_ANSWER_S:.0f} s")
            return pipe.recv()
        except EOFError as e:
            raise RuntimeError(f"the receiver ended in {method}; its error is above") from e

    pusher = WeightPusher(
        transport, 0, WeightStream(specs, lambda: iter(state.items())), EngineFanOut([1], call), "127.0.0.1"
    )
    pusher.connect()
    seconds, total = [], sum(2 * spec.shape[0] * (spec.shape[1] if len(spec.shape) > 1 else 1) for spec in specs)
    for version in range(1, _PUSHES + 1):
        g = torch.Generator(context.device).manual_seed(version)
        for spec in specs:
            state[spec.name] = torch.randn(spec.shape, generator=g, device=context.device, dtype=spec.dtype)
        began = time.perf_counter()
        pusher.push(version)
        seconds.append(time.perf_counter() - began)
        got = call("checksums", [()])
        for name, tensor in state.items():
            want = checksum(tensor)
            outcome.require(
                got.get(name) == want, f"push {version}: {name} has checksum {got.get(name)}, sent was {want}"
            )
    outcome.numbers |= {"MiB": total / 2**20, "seconds": seconds, "GB/s": total / min(seconds) / 1e9}


def _encoded(arguments: tuple[Any, ...]) -> list[bytes]:
    """As vLLM's front end writes what it sends to an engine core."""
    from vllm.v1.serial_utils import MsgpackEncoder

    parts: Any = MsgpackEncoder().encode(list(arguments))
    return [bytes(part) for part in parts]


class _Model(torch.nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.got.update(weights)


def receive(pipe: Connection, transport: str, place: str) -> None:
    """The other process: the transfer engine that an engine's worker would have, on a model that keeps what comes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.v1.serial_utils import MsgpackDecoder

    from stare_megatron.sync.plugin import register

    register()
    kind: Any = WeightTransferEngineFactory._registry[transport]()
    model = _Model()
    alone = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    engine = kind(None, SimpleNamespace(parallel_config=alone, model_config=None), torch.device(place, 0), model)

    def answer(method: str, arguments: list[Any]) -> Any:
        if method == "init_weight_transfer_engine":
            engine.init_transfer_engine(engine.parse_init_info(arguments[0]))
        elif method == "update_weights":
            engine.receive_weights(engine.parse_update_info(arguments[0]))
        elif method == "checksums":
            return {name: checksum(tensor) for name, tensor in model.got.items()}
        return None

    while True:
        try:
            method, encoded = pipe.recv()
        except EOFError:
            break
        pipe.send(answer(method, MsgpackDecoder().decode(encoded)))
    engine.shutdown()
