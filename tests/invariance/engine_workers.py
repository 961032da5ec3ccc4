"""vLLM's own CPU workers, without an engine around them: processes that serve the calls of a weight push.

    python engine_workers.py FOLDER        with the environment of an engine

imports vLLM once and forks the workers that lines of stdin ask for; each listens at a socket in FOLDER. `Workers` is
the other side: an `EngineFanOut` of one engine.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any
from uuid import uuid4

import expert_kernels
import pytest

ROOT = Path(__file__).parents[2]
_patches, _gpu = pytest.MonkeyPatch(), []


class Nursery:
    """Forks workers."""

    def __init__(self, folder: Path) -> None:
        from stare_megatron.host import device

        self.folder = folder
        self._prefix = f"workers-{uuid4().hex}-"
        environment = os.environ | device.engine_environment() | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._log = (folder / "workers.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start(
        self, name: str, model: Path, workers: int, dtype: str, expert_parallel: bool = False, kernel: str = ""
    ) -> Workers:
        """`kernel`: keep experts as this backend of vLLM does (`expert_kernels`)."""
        # Not a port: vLLM names shared memory by it, and what a killed worker left under that name ends the next one.
        address = f"file://{self.folder}/{self._prefix}{name}"
        assert self._process.stdin is not None
        for rank in range(workers):
            order = [f"{name}.{rank}", str(model), workers, rank, address, dtype, expert_parallel, kernel]
            print(json.dumps(order), file=self._process.stdin, flush=True)
        return Workers(name, self.folder, workers)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        for left in Path("/dev/shm").glob(f"{self._prefix}*"):  # workers are killed
            left.unlink()


class Workers:
    """Calls to the workers of an engine, at once. Pickles: another process may call, too."""

    def __init__(self, name: str, folder: Path, count: int) -> None:
        self.name = name
        self._folder = folder
        self.count = count

    def call(self, method: str, *args: Any) -> list[Any]:
        """What each worker returns. Raises what one raised."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(lambda rank: self._one(rank, method, args), range(self.count)))

    def fan_out(self) -> Any:
        from stare_megatron.sync.fanout import EngineFanOut

        def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
            (args,) = arguments
            self.call(method, *(args if method != "finish_weight_update" else ()))

        return EngineFanOut([self.count], call)

    def _one(self, rank: int, method: str, args: tuple[Any, ...]) -> Any:
        path = self._folder / f"{self.name}.{rank}"
        deadline = time.monotonic() + 600
        while not path.exists():
            if (why := _failure(path)).exists():
                raise RuntimeError(f"{self.name}, worker {rank}, did not start:\n{why.read_text()}")
            if time.monotonic() > deadline:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it was not even forked, or is gone
                    os.kill(int(_pid(path).read_text()), signal.SIGUSR1)  # faulthandler: every thread's stack
                time.sleep(1.0)
                log = (self._folder / "workers.log").read_text()[-6000:]
                raise TimeoutError(f"{self.name}, worker {rank}, did not start in 600 s:\n{log}")
            time.sleep(0.05)
        with _connected(path) as pipe:
            pipe.send((method, args))
            failed, value = pipe.recv()
        if failed:
            raise RuntimeError(f"{self.name}, worker {rank}: {value}")
        return value


def _failure(path: Path) -> Path:
    """Where a worker says why it did not come to listen at `path`."""
    return path.with_name(f"{path.name}.failed")


def _pid(path: Path) -> Path:
    return path.with_name(f"{path.name}.pid")


def _write(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.rename(path)


def _connected(path: Path) -> Any:
    for _ in range(1200):  # there is a socket a moment before anybody listens at it
        with contextlib.suppress(ConnectionRefusedError):
            return Client(str(path), "AF_UNIX")
        time.sleep(0.05)
    return Client(str(path), "AF_UNIX")


def _serve(
    path: str, model: str, workers: int, rank: int, address: str, dtype: str, expert_parallel: bool, kernel: str
) -> None:
    if kernel:
        expert_kernels.install(kernel)
    worker = _worker(model, workers, rank, address, dtype, expert_parallel)
    with Listener(path, "AF_UNIX") as listener:
        while True:
            with listener.accept() as pipe:
                method, args = pipe.recv()
                if method == "end":
                    pipe.send((False, None))
                    return
                try:
                    found = _OWN[method](worker, *args) if method in _OWN else getattr(worker, method)(*args)
                    pipe.send((False, found))
                except Exception as e:  # noqa: BLE001 - goes to the caller
                    traceback.print_exc()
                    pipe.send((True, f"{type(e).__name__}: {e}"))


def _worker(model: str, workers: int, rank: int, address: str, dtype: str, expert_parallel: bool) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.cpu_worker import CPUWorker

    config = EngineArgs(
        model=model,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        skip_tokenizer_init=True,
        tensor_parallel_size=workers,
        enable_expert_parallel=expert_parallel,
        distributed_executor_backend="mp" if workers > 1 else None,
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=1 << 20,
        weight_transfer_config={"backend": "sharded"},  # pyright: ignore[reportArgumentType]
        worker_extension_cls="stare_megatron.sync.worker.ChecksumExtension",
    ).create_engine_config()
    with set_current_vllm_config(config):
        worker = CPUWorker(config, rank, rank, address, is_driver_worker=rank == 0)
        worker.init_device()
        worker.load_model()
    return worker


def _state(worker: Any) -> dict[str, Any]:
    """Everything the model computes with: parameters as they are kept, and matrices that are kept packed."""
    from stare_megatron.sync.loaded import loaded_form

    model, found = worker.model_runner.get_model(), {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{path}.{name}"] = _plain(parameter)
            if name == "weight" and (read := loaded_form(module, name)) is not None:
                found[f"{path}.{name} as used"] = _plain(read(()))
    return found


def _plain(tensor: Any) -> Any:
    return tensor.detach().float().numpy().copy()


def _scramble(worker: Any, seed: int) -> None:
    """Other weights."""
    import torch

    torch.manual_seed(seed)
    _load(worker, lambda name, tensor: torch.randn_like(tensor))


def _load_with_swapped_rows(worker: Any, name: str, one: int, other: int, rows: int) -> None:
    """The checkpoint, but for two blocks of rows of a tensor, which change places."""

    def changed(its: str, tensor: Any) -> Any:
        found = tensor.clone()
        if its == name:
            found[one : one + rows], found[other : other + rows] = (
                tensor[other : other + rows],
                tensor[one : one + rows],
            )
        return found

    _load(worker, changed)


def _load(worker: Any, changed: Callable[[str, Any], Any]) -> None:
    """The checkpoint's tensors as `changed` makes them."""
    _reload(worker, [(name, changed(name, tensor)) for name, tensor in _checkpoint(worker)])


def _checkpoint(worker: Any) -> list[tuple[str, Any]]:
    from safetensors.torch import load_file

    return list(load_file(Path(worker.model_config.model) / "model.safetensors").items())


def _reload(worker: Any, weights: Sequence[tuple[str, Any]]) -> None:
    """Whole tensors: vLLM's own loading and layerwise reload."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from stare_megatron.sync.cpu_engine import repack_experts, repack_tied_heads

    model, config = worker.model_runner.get_model(), worker.model_config
    repack_experts(model)
    initialize_layerwise_reload(model)
    model.load_weights([(name, tensor.to(config.dtype)) for name, tensor in weights])
    finalize_layerwise_reload(model, config)
    repack_tied_heads(model, packed=False)


def _load_random(worker: Any, seed: int, instead: dict[str, str | None]) -> dict[str, str]:
    """Random tensors, whole; what `instead` names is that of another name, or is left out (None). Returns the checksums
    of what each should be."""
    import torch

    from stare_megatron.sync.check import checksum

    torch.manual_seed(seed)
    own = {name: torch.randn_like(tensor).to(worker.model_config.dtype) for name, tensor in _checkpoint(worker)}
    sources = [(name, instead.get(name, name)) for name in own]
    _reload(worker, [(name, own[source]) for name, source in sources if source is not None])
    return {name: checksum(tensor) for name, tensor in own.items()}


def _sums(worker: Any) -> dict[str, str]:
    return {label: f"{value:016x}" for label, value in worker.weight_transfer_engine.sums(()).items()}


def _pieces(worker: Any) -> dict[str, tuple[int, int]]:
    """Of each parameter by its Hugging Face name, as where whole tensors are pushed: this worker's share of its
    checksum."""
    from stare_megatron.sync.check import shard_sum
    from stare_megatron.sync.worker import pieces

    model = worker.model_runner.get_model()
    parts = pieces(model, model.packed_modules_mapping)
    return {p.name: (p.shard, shard_sum(p.tensor, p.row, p.column, p.width)) for p in parts}


def _unused_packed(worker: Any) -> list[str]:
    """Embeddings of which the worker keeps a packed copy, though a head of its own does the multiplying."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(worker.model_runner.get_model().named_modules())
    heads = [path for path, module in modules if isinstance(module, ParallelLMHead)]
    kinds = [(path, module) for path, module in modules if isinstance(module, VocabParallelEmbedding)]
    return [path for path, module in kinds if heads and path not in heads and "cpu_linear" in vars(module)]


def _swap_rows(worker: Any, path: str, one: int, other: int, rows: int) -> None:
    """Exchange two blocks of rows of a parameter that is kept as it is loaded."""
    weight = worker.model_runner.get_model().get_submodule(path).weight.data
    a, b = weight[one : one + rows].clone(), weight[other : other + rows].clone()
    weight[one : one + rows], weight[other : other + rows] = b, a


def _die_in_push(worker: Any) -> None:
    """After the first part of the next one."""
    from stare_megatron.sync.load import Loader

    take = Loader.take

    def once(self: Loader, *args: Any) -> None:
        take(self, *args)
        os._exit(1)

    Loader.take = once  # pyright: ignore[reportAttributeAccessIssue]


def _be_at(worker: Any, machine: str, gpu: str) -> None:
    """Say so in the next handshake; with a name of a GPU, have a stand-in for one. No machine: where we are."""
    from gpu_stand_in import Gpu

    from stare_megatron.sync import receiver
    from stare_megatron.sync.place import Place

    _patches.undo()
    _gpu.clear()
    if machine:
        _patches.setattr(receiver, "place", lambda device: Place(machine, gpu))
    if gpu:
        _gpu.append(Gpu())
        _gpu[0].install(_patches.setattr)


def _gpu_in_use(worker: Any) -> int:
    return sum(gpu.in_use for gpu in _gpu)


def _needed_bytes(worker: Any) -> int:
    joined = worker.weight_transfer_engine._joined
    return sum(need.box.elements for need in joined.needs.cut) * joined.receiver.dtype.itemsize


_OWN = {
    "be_at": _be_at,
    "gpu_in_use": _gpu_in_use,
    "state": _state,
    "scramble": _scramble,
    "sums": _sums,
    "pieces": _pieces,
    "swap_rows": _swap_rows,
    "load_with_swapped_rows": _load_with_swapped_rows,
    "load_random": _load_random,
    "swap_experts": expert_kernels.swap_experts,
    "turn_expert_map": expert_kernels.turn_expert_map,
    "kernels": expert_kernels.in_use,
    "die_in_push": _die_in_push,
    "needed_bytes": _needed_bytes,
    "unused_packed": _unused_packed,
}


def main(folder: str) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    import vllm.engine.arg_utils
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from stare_megatron.sync import sharded_engine, worker  # noqa: F401
    from stare_megatron.sync.plugin import register

    register()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children = []
    for line in sys.stdin:
        name, *rest = json.loads(line)
        pid = os.fork()
        if not pid:
            path = Path(folder, name)
            try:
                faulthandler.register(signal.SIGUSR1)
                _write(_pid(path), str(os.getpid()))
                _serve(str(path), *rest)
            except BaseException:  # noqa: BLE001 - goes to the caller
                traceback.print_exc()
                _write(_failure(path), traceback.format_exc())
            finally:
                sys.stdout.flush()
                os._exit(0)
        children.append(pid)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
