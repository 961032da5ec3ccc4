"""Memory of a device and of the host beside it: what moves state between them asks here.

On a CPU the host's memory is the device's: nothing is page-locked, no stream is needed, and nothing is returned.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import psutil
import torch

from stare_megatron.errors import RunError
from stare_megatron.host.device import Device, current


def host_block(
    size: int,
    key: str = "trainer.offload",
    cure: str = "offload fewer classes, or use more ranks to a copy of the model",
) -> torch.Tensor:
    """uint8 [size] in one allocation of host memory, page-locked on a GPU machine so that copies run beside other work
    and at the bus's speed.

    `key` asked for it, and `cure` asks for less.

    Registered, not allocated, with CUDA: torch's allocator of page-locked memory rounds up to a power of two.

    Raises:
        RunError: this machine has less, or does not let a process lock it.
    """
    free = psutil.virtual_memory().available
    if size > free:
        raise RunError(
            f"a trainer rank keeps {size / 2**30:.1f} GiB in host memory ({key}), {free / 2**30:.1f} are free on "
            f"its machine; {cure}"
        )
    block_B = torch.empty(size, dtype=torch.uint8)
    if size and current() is Device.CUDA:
        cudart: Any = torch.cuda.cudart()
        code = int(cudart.cudaHostRegister(block_B.data_ptr(), size, 0))
        if code:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            raise RunError(
                f"CUDA cannot page-lock {size / 2**30:.1f} GiB of host memory ({key}): error {code}; "
                f"RLIMIT_MEMLOCK is {'unlimited' if limit < 0 else f'{limit >> 20} MiB'}, see `ulimit -l` and the "
                "memory limit of the container"
            )
    return block_B


def copy_stream() -> torch.cuda.Stream | None:
    """A stream for copies beside the device's other work; None on a CPU."""
    return torch.cuda.Stream() if current() is Device.CUDA else None


def on_stream(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
    """Work within it runs on `stream`, after what was begun before it."""
    if stream is None:
        return contextlib.nullcontext()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def wait_for(stream: torch.cuda.Stream | None) -> None:
    """Returns when what runs on `stream` is done."""
    if stream is not None:
        stream.synchronize()


def finish() -> None:
    """Returns when what this thread has begun on its device is done."""
    if current() is Device.CUDA:
        torch.cuda.current_stream().synchronize()


def collect_shared() -> None:
    """Take back memory that other processes had mapped and do not use any more."""
    if current() is Device.CUDA:
        torch.cuda.ipc_collect()


def release_cache() -> None:
    """Give memory that torch keeps for later back to the device."""
    if current() is Device.CUDA:
        torch.cuda.empty_cache()


def allocated_bytes() -> int:
    """Of the device, by tensors of this process; 0 on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated() if current() is Device.CUDA else 0


def free_bytes() -> int:
    """Of the device, for whoever asks first; of the host on a CPU."""
    return torch.cuda.mem_get_info()[0] if current() is Device.CUDA else psutil.virtual_memory().available
