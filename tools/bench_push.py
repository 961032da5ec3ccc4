"""A push of weights into one vLLM worker on this machine, whole tensors and sharded, beside memcpy, in one run.

python tools/bench_push.py [FOLDER with config.json] [--only whole|sharded] [--pushes N]

The weights are random, laid out as one Megatron-Core rank has them; the engine's side is vLLM's worker in a process of
its own. Without a folder: a Qwen2 of 536 million parameters in bfloat16, tied. CPUs only. Seconds of a processor, which
the kernel counts for each process, say what a push costs where others want the cores too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stare_megatron.host import device
from stare_megatron.models.boxes import Box, held
from stare_megatron.models.entries import ParameterEntry, entries, hf_names
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shape import ModelShape, Split
from stare_megatron.models.shards import merge
from stare_megatron.sync.fanout import EngineFanOut
from stare_megatron.sync.push import WeightPusher
from stare_megatron.sync.sharded import ShardedPusher
from stare_megatron.sync.source import ParamSpec, WeightStream
from stare_megatron.sync.wire import host_store

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.gpu_check_parts.push_receivers import vllm_worker

DTYPE = torch.bfloat16
KINDS = {"whole": "gloo", "sharded": "sharded"}  # our names, and vLLM's backends
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1024,
    "intermediate_size": 4864,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


class Rank:
    """The parameters of one rank that has the whole model."""

    def __init__(self, shape: ModelShape, where: str = "cpu") -> None:
        self.shape = shape
        self.parts = [
            (entry, [_made(entry, shape, where) for _ in range(entry.experts(shape))]) for entry in entries(shape)
        ]
        self.specs = tuple(ParamSpec(name, DTYPE, want) for name, want in hf_names(shape).items())
        self.bytes = sum(t.nbytes for _, tensors in self.parts for t in tensors)

    def holdings(self) -> Iterator[tuple[Box, torch.Tensor]]:
        for entry, tensors in self.parts:
            for expert, tensor in enumerate(tensors):
                for part in held(entry, self.shape, expert, 0, 1, tensor.shape[0]):
                    yield part.box, tensor[part.where]

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        for entry, tensors in self.parts:
            for expert, tensor in enumerate(tensors):
                yield from zip(entry.names(expert), merge(entry.tensor, [tensor], self.shape), strict=True)


def _made(entry: ParameterEntry, shape: ModelShape, where: str) -> torch.Tensor:
    wants = entry.wants(shape)
    split = entry.tensor.layout in (Split.QKV, Split.GATED, Split.EXPERT_GATED)
    rows = sum(want[0] for want in wants) if split else wants[0][0]
    return torch.randn(rows, *wants[0][1:], device=where).to(DTYPE) * 0.02


def serve(pipe: Connection, folder: str) -> None:
    """The engine's process: a worker, and both ways to receive on its one model."""
    engines = _engines(folder)
    seconds = _clocks()
    before, began = 0, Used.now()
    while (order := pipe.recv()) is not None:
        kind, method, args = order
        if method == "init_weight_transfer_engine":
            engines[kind].init_transfer_engine(engines[kind].parse_init_info(*args))
        elif method == "start_weight_update":
            seconds.clear()
            before, began = forget_peak(), Used.now()
            engines[kind].start_weight_update()
        elif method == "update_weights":
            engines[kind].receive_weights(engines[kind].parse_update_info(*args))
        elif method == "finish_weight_update":
            engines[kind].finish_weight_update()
            seconds |= {"held": before, "grew": peak() - before, **(Used.now() - began)._asdict()}
        pipe.send(dict(seconds))


def _engines(folder: str) -> dict[str, Any]:
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    worker, config = vllm_worker(folder, on_gpu=False)
    model = worker.model_runner.get_model()
    make = WeightTransferEngineFactory.create_engine
    return {
        kind: make(WeightTransferConfig(backend=kind), config, torch.device("cpu"), model) for kind in KINDS.values()
    }


def _clocks() -> dict[str, float]:
    """Seconds of a push that go into the modules' `process_weights_after_loading`: the packing."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    seconds: dict[str, float] = {}
    for kind in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        process = kind.process_weights_after_loading

        def timed(self: Any, layer: Any, process: Callable[..., None] = process) -> None:
            began, used = time.perf_counter(), Used.now()
            process(self, layer)
            seconds["packing"] = seconds.get("packing", 0.0) + time.perf_counter() - began
            seconds["packing_cpu"] = seconds.get("packing_cpu", 0.0) + sum((Used.now() - used)[:2])

        kind.process_weights_after_loading = timed
    return seconds


class Used(NamedTuple):
    """What this process has had of the processors: seconds of its own and in the kernel, and pages it was given."""

    user: float
    system: float
    pages: int

    @classmethod
    def now(cls) -> Used:
        found = resource.getrusage(resource.RUSAGE_SELF)
        return cls(found.ru_utime, found.ru_stime, found.ru_minflt)

    def __sub__(self, other: Used) -> Used:
        return Used(self.user - other.user, self.system - other.system, self.pages - other.pages)


def forget_peak() -> int:
    """This process's resident memory now, from which `peak` counts on."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def memcpy_rate() -> float:
    """Bytes per second of a warm copy of 256 MiB, one thread."""
    a, b = torch.ones(256 << 20, dtype=torch.uint8), torch.ones(256 << 20, dtype=torch.uint8)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        b.copy_(a)
        best = max(best, a.nbytes / (time.perf_counter() - began))
    return best


class Push(NamedTuple):
    """One push: `seconds`, of them `packing`; processor seconds; pages; bytes by which resident memory
    grew, and what the engine had before."""

    seconds: float
    packing: float
    packing_cpu: float
    sender_cpu: float
    engine_user: float
    engine_system: float
    engine_pages: float
    sender_grew: float
    engine_grew: float
    engine_held: float


def push_all(rank: Rank, pipe: Connection, chosen: Sequence[str], pushes: int) -> None:
    engine: dict[str, float] = {}

    def client(kind: str) -> EngineFanOut:
        def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
            pipe.send((kind, method, arguments[0]))
            engine.update(pipe.recv())

        return EngineFanOut([1], call)

    ways: dict[str, Callable[[int], Any]] = {}
    if "whole" in chosen:
        whole = WeightPusher("gloo", 0, WeightStream(rank.specs, rank.whole), client("gloo"), "127.0.0.1")
        whole.connect()
        ways["whole"] = whole.push
    if "sharded" in chosen:
        sharded = ShardedPusher(0, 1, rank.specs, rank.holdings, host_store("127.0.0.1"), "127.0.0.1")
        began = time.perf_counter()
        sharded.connect({"engine 0": client("sharded")})
        print(f"the plan, once: {time.perf_counter() - began:.2f} s", flush=True)
        ways["sharded"] = sharded.push
    found: dict[str, list[Push]] = {way: [] for way in ways}
    for number in range(pushes):
        for way, push in ways.items():
            engine.clear()
            before, used = forget_peak(), Used.now()
            began = time.perf_counter()
            push(number)
            seconds, mine = time.perf_counter() - began, Used.now() - used
            packing = engine.get("packing", 0.0), engine.get("packing_cpu", 0.0)
            theirs = engine["user"], engine["system"], engine["pages"]
            found[way].append(
                Push(
                    seconds, *packing, mine.user + mine.system, *theirs, peak() - before, engine["grew"], engine["held"]
                )
            )
    rate = memcpy_rate()
    print(f"{rank.bytes / 1e6:.0f} MB; memcpy {rate / 1e9:.2f} GB/s, {rank.bytes / rate:.2f} s")
    for way, measured in found.items():
        show(way, measured, rank.bytes, rate)


def show(way: str, measured: Sequence[Push], size: int, rate: float) -> None:
    """Medians of all but the first; of memory what the last took."""
    m, last = Push(*map(statistics.median, zip(*measured[1:], strict=True))), measured[-1]
    share, bare = size / m.seconds / rate, size / (m.seconds - m.packing) / rate
    print(f"{way}: {m.seconds:.2f} s, {size / m.seconds / 1e9:.2f} GB/s, {share:.2f} of memcpy's rate")
    print(f"  {m.packing:.2f} s of it the engine's packing; {bare:.2f} of memcpy's rate without")
    print(
        f"  processor seconds: sender {m.sender_cpu:.2f}, engine {m.engine_user + m.engine_system:.2f}, of them "
        f"{m.packing_cpu:.2f} its packing, {m.engine_system:.2f} the kernel, for {m.engine_pages:.0f} pages"
    )
    print(
        f"  resident memory grew by {last.sender_grew / 2**20:.0f} MiB (sender) and {last.engine_grew / 2**20:.0f} MiB "
        f"(engine, from {last.engine_held / 2**20:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, metavar="FOLDER", help="with a config.json")
    parser.add_argument("--only", choices=KINDS, help="one way alone, not both by turns")
    parser.add_argument("--pushes", type=int, default=5, help="of each kind; the first is left out (default: 5)")
    options = parser.parse_args()
    model: Path | None = options.model
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = model or Path(made)
        if model is None:
            (folder / "config.json").write_text(json.dumps(CONFIG))
        os.environ.update(device.engine_environment())
        spawn = multiprocessing.get_context("spawn")
        mine, theirs = spawn.Pipe()
        engine = spawn.Process(target=serve, args=(theirs, str(folder)), daemon=True)
        engine.start()
        theirs.close()
        try:
            push_all(
                Rank(read_hf_config(folder)), mine, [options.only] if options.only else list(KINDS), options.pushes
            )
            mine.send(None)
            engine.join(20)
        finally:
            engine.kill()


if __name__ == "__main__":
    main()
