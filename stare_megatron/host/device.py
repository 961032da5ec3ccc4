"""The only file that knows whether we are on CPUs or NVIDIA GPUs.

Everything else asks this module: which torch device a rank uses, which backend torch.distributed speaks, which weight
transport joins trainer and engine, which environment an engine or a trainer process needs.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stare_megatron.errors import UserError
from stare_megatron.host.memory import peak_resident_bytes
from stare_megatron.host.packages import version

if TYPE_CHECKING:
    import torch


# vLLM writes the whole KV cache at start: its size is resident memory.
CPU_KV_CACHE_BYTES = 256 << 20
# Newest operations of torch.distributed that a rank remembers, some kilobytes each with the stack that began it.
FLIGHT_OPERATIONS = 2000
TRANSFORMER_ENGINE_CURE = (
    "its extension is built for one version of torch: build it for this one with `tools/build_te.sh PYTHON wheels` and "
    "install that wheel, or uninstall transformer-engine to train with Megatron-Core's local layers (docs/gpu.md)"
)


class Device(enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


@functools.cache
def current() -> Device:
    """CUDA if torch sees an NVIDIA GPU, else CPU. `STARE_DEVICE=cpu` forces the CPU on a GPU machine."""
    import torch

    forced = os.environ.get("STARE_DEVICE", "")
    if forced:
        return Device(forced)
    return Device.CUDA if torch.cuda.is_available() else Device.CPU


class Gpu(NamedTuple):
    """`bytes`: its memory; 0 where the driver does not say (a MIG instance without a size in its name)."""

    name: str
    bytes: int
    uuid: str


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs this process may use, in CUDA's order, without importing torch; () where `current` would say CPU.

    Asks `nvidia-smi`, which comes with the driver, and reads CUDA_VISIBLE_DEVICES as CUDA does: indices, UUIDs
    (`GPU-...`, or the beginning of one) and MIG instances (`MIG-...`), up to the first that is none.
    """
    if os.environ.get("STARE_DEVICE", "") == Device.CPU.value or shutil.which("nvidia-smi") is None:
        return ()
    lines = [
        line.split(",") for line in _nvidia_smi("--query-gpu=name,memory.total,uuid", "--format=csv,noheader,nounits")
    ]
    found = []
    for name, *rest in lines:
        memory, uuid = (*(part.strip() for part in rest), "", "")[:2]
        found.append(Gpu(name.strip(), bytes_of(memory), uuid))
    chosen = visible([gpu.uuid for gpu in found], os.environ.get("CUDA_VISIBLE_DEVICES"))
    return tuple(found[item] if isinstance(item, int) else mig_instance(item) for item in chosen)


def visible(uuids: Sequence[str], named: str | None) -> list[int | str]:
    """Which of a machine's GPUs CUDA shows a process, in its order: indices of `uuids`, and names of MIG instances.
    `named`: CUDA_VISIBLE_DEVICES; None: not set."""
    if named is None or not uuids:
        return list(range(len(uuids)))
    chosen: list[int | str] = []
    for item in map(str.strip, named.split(",")):
        if item.startswith("MIG-"):
            chosen.append(item)
        elif item.isdecimal() and int(item) < len(uuids):
            chosen.append(int(item))
        elif item.startswith("GPU-") and (same := [i for i, uuid in enumerate(uuids) if uuid.startswith(item)]):
            chosen.append(same[0])
        else:
            break
    return chosen


def bytes_of(mebibytes: str) -> int:
    """Of memory as nvidia-smi tells it; 0 where it does not ("[N/A]")."""
    return int(mebibytes) * 2**20 if mebibytes.isdecimal() else 0


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """The names of `gpus`."""
    return tuple(gpu.name for gpu in gpus())


def _nvidia_smi(*arguments: str) -> list[str]:
    """Its lines; none where it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def mig_instance(uuid: str) -> Gpu:
    """As `nvidia-smi -L` lists it. A line of `nvidia-smi -L` is "  MIG 3g.40gb     Device  0: (UUID: MIG-...)"."""
    line = next((line for line in _nvidia_smi("-L") if uuid in line), "")
    size = re.search(r"\.(\d+)gb", line)
    return Gpu(line.partition("Device")[0].strip() or "MIG", int(size[1]) * 2**30 if size else 0, uuid)


def gpu_summary() -> str:
    """`gpu_names` as text, "8 x NVIDIA H100, ..."; "" where there are none."""
    gpus = gpu_names()
    return ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))


def torch_device(local_rank: int) -> torch.device:
    """The device of a trainer rank; selects it as current on a GPU."""
    import torch

    if current() is Device.CPU:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def distributed_backend() -> str:
    """Backend for torch.distributed process groups."""
    return "gloo" if current() is Device.CPU else "nccl"


def weight_transport(colocated: bool, method: str = "whole") -> str:
    """Name of the vLLM weight-transfer backend. `method`: `sync.method`; `sharded` has one backend for all devices. Of
    whole tensors: `gloo` on CPUs, `cuda_ipc` on shared GPUs, `nccl` between GPUs."""
    if method == "sharded" or (method == "auto" and current() is Device.CPU):
        return "sharded"
    if current() is Device.CPU:
        return "gloo"
    return "cuda_ipc" if colocated else "nccl"


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine serves the layers: on a GPU, where it is installed. Else Megatron-Core's local spec.

    Call it before anything of Megatron-Core is imported, which fails in ways of its own, or goes on without, where
    Transformer Engine is installed and broken.

    Raises:
        UserError: it is installed and cannot be imported, as when its extension was built for another torch.
    """
    if current() is not Device.CUDA or importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as e:
        packages = ("transformer_engine", "transformer_engine_torch", "torch")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        raise UserError(
            f"Transformer Engine is installed and cannot be imported ({versions}): {type(e).__name__}: "
            f"{next(iter(str(e).splitlines()), '')}; {TRANSFORMER_ENGINE_CURE}"
        ) from e
    return True


def has_apex() -> bool:
    """NVIDIA Apex (a source build; the PyPI package of that name is something else, without `apex.optimizers`)."""
    return (
        current() is Device.CUDA
        and importlib.util.find_spec("apex") is not None
        and bool(importlib.util.find_spec("apex.optimizers"))
    )


def triton_serves(x: torch.Tensor) -> bool:
    """Whether our Triton kernels work on `x`: on an NVIDIA GPU of compute capability 8.0 or later, with triton there.

    Under Triton's interpreter (`TRITON_INTERPRET=1`: slow, it checks kernels) they work on CPU tensors too.
    `STARE_TRITON=0` says no in any case.
    """
    if os.environ.get("STARE_TRITON", "") == "0" or not _has_triton():
        return False
    if os.environ.get("TRITON_INTERPRET", "") == "1":
        return True
    return x.is_cuda and _properties(x.device).major >= 8


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _properties(of: torch.device) -> Any:
    import torch

    return torch.cuda.get_device_properties(of)


def trainer_environment() -> dict[str, str]:
    """Environment variables of a trainer rank's process. (On GPUs ranks import vLLM's transfer classes.)"""
    common = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_FR_BUFFER_SIZE": str(FLIGHT_OPERATIONS),
    }
    if current() is Device.CPU:
        return common | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return common | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def _preloads() -> list[str]:
    """Libraries vLLM's CPU build must have preloaded: Intel OpenMP (20x) and, where installed, tcmalloc."""
    libraries = []
    for pattern in ("/usr/lib/*/libtcmalloc_minimal.so.4", "/usr/lib64/libtcmalloc_minimal.so.4"):
        libraries += [str(p) for p in sorted(Path("/").glob(pattern.lstrip("/")))][:1]
    omp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if omp.exists():
        libraries.append(str(omp))
    return libraries


def engine_environment() -> dict[str, str]:
    """Environment variables of an engine's process and of the workers vLLM starts from it."""
    common = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if current() is Device.CUDA:
        # vLLM takes it to be there, as pip installs it, and asks before it looks.
        without = {} if importlib.util.find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
        return common | without
    return common | {
        "LD_PRELOAD": ":".join(_preloads()),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # A single worker lives in the engine core's process: 2 processes an engine instead of 3.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }


def engine_args(colocated: bool, tensor_parallel: int) -> dict[str, Any]:
    """vLLM EngineArgs that follow from the device; `[inference.vllm]` overrides them."""
    # In a placement group vLLM would start its workers as Ray actors, for which the group has no device left.
    several: dict[str, Any] = {"distributed_executor_backend": "mp"} if tensor_parallel > 1 else {}
    if current() is Device.CPU:
        return several | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            # vLLM takes back the draw of a sample it throws away, which it does after part of a prompt, by the
            # generator's offset; CPU generators have none, and the engine dies.
            "enable_chunked_prefill": False,
        }
    return several | {"enable_sleep_mode": colocated}


def engine_sleeps() -> bool:
    """Whether a paused engine can free its memory (vLLM's sleep mode). On CPUs it only stops working."""
    return current() is Device.CUDA


def forget_peak() -> None:
    """`peak_memory_bytes` is of what comes from now on; on a CPU where the kernel lets a process ask for it."""
    if current() is Device.CUDA:
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Most memory this process has held: resident set on a CPU, allocated by torch on a GPU."""
    if current() is Device.CUDA:
        import torch

        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()
