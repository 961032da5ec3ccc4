"""What one GPU reaches: matrix products, attention, memory, the host's bus, and a kernel's launch. A few minutes.

Only this file of the planner needs torch. No GPU has run it yet; on a CPU it is tested with small sizes, whose numbers
mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.plan.hardware import find

if TYPE_CHECKING:
    import torch

_REPEATS = 7
# Rows and columns of the products that a layer of 2, 7 and 32 B parameters makes, at 8,192 tokens.
_PRODUCTS = ((8192, 1536, 17920), (8192, 8960, 1536), (8192, 3584, 18944), (8192, 5120, 25600), (8192, 25600, 5120))
_ATTENTION = ((4, 2048), (1, 8192), (1, 32768))  # sequences, tokens
_HEADS, _GROUPS, _HEAD = 32, 8, 128
_COPY = 2**30  # bytes
_LAUNCHES = 2000
# Kernels of a layer forward, counted by recorded operators (docs/gpu.md): Megatron-Core's own, Transformer Engine's.
_KERNELS_LOCAL, _KERNELS_ENGINE = 80, 25


def calibrate(say: Callable[[str], None]) -> dict[str, float]:
    """Measure the first visible GPU; constants by their names in `hardware.Constants`.

    Raises:
        UserError: no GPU, or one that the table does not know.
    """
    seen = device.gpus()
    if not seen:
        raise UserError("plan --calibrate: no GPU is visible on this machine; run it where the ranks will run")
    gpu = find(seen[0].name)
    place = device.torch_device(0)
    found = {}
    say(f"{seen[0].name}: matrix products")
    found["gemm"] = statistics.median(products(place, *sizes) for sizes in _PRODUCTS) / gpu.flops
    say("attention")
    found["attention"] = statistics.median(attention(place, *sizes) for sizes in _ATTENTION) / gpu.flops
    say("memory and the host's bus")
    found["bandwidth"] = copies(place, _COPY) / gpu.bandwidth
    found["host"] = from_host(place, _COPY) / gpu.host
    say("launches")
    launch = launches(place, _LAUNCHES)
    found["launch_local"], found["launch_engine"] = _KERNELS_LOCAL * launch, _KERNELS_ENGINE * launch
    for name, value in found.items():
        say(f"{name:<14}{value:.3g}")
    return found


def seconds(place: torch.device, work: Callable[[], object]) -> float:
    """Median over some runs, after two to warm up."""
    import torch

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    taken = []
    for _ in range(_REPEATS + 2):
        wait()
        began = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def products(place: torch.device, rows: int, inner: int, columns: int) -> float:
    """FLOP/s of [rows, inner] x [inner, columns] in bfloat16."""
    import torch

    a = torch.randn(rows, inner, device=place, dtype=torch.bfloat16)
    b = torch.randn(inner, columns, device=place, dtype=torch.bfloat16)
    return 2.0 * rows * inner * columns / seconds(place, lambda: a @ b)


def attention(place: torch.device, sequences: int, tokens: int) -> float:
    """FLOP/s of causal attention forward, bfloat16, four query heads a key-value head."""
    import torch

    q, k, v = (
        torch.randn(sequences, heads, tokens, _HEAD, device=place, dtype=torch.bfloat16)
        for heads in (_HEADS, _GROUPS, _GROUPS)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    taken = seconds(place, lambda: attend(q, k, v, is_causal=True, enable_gqa=True))
    return 2.0 * sequences * tokens**2 * _HEADS * _HEAD / taken


def copies(place: torch.device, size: int) -> float:
    """Bytes/s read and written by a copy in the device's memory."""
    import torch

    a, b = (torch.zeros(size, device=place, dtype=torch.uint8) for _ in range(2))
    return 2.0 * size / seconds(place, lambda: b.copy_(a))


def from_host(place: torch.device, size: int) -> float:
    """Bytes/s from pinned memory of the host."""
    import torch

    a = torch.zeros(size, dtype=torch.uint8, pin_memory=place.type == "cuda")
    b = torch.empty(size, device=place, dtype=torch.uint8)
    return size / seconds(place, lambda: b.copy_(a, non_blocking=True))


def launches(place: torch.device, count: int) -> float:
    """Seconds of the host for one small operator that autograd records, as Python calls it."""
    import torch

    x = torch.ones(8, device=place, requires_grad=True)

    def work() -> None:
        y = x
        for _ in range(count):
            y = y * 1.0001

    return seconds(place, work) / count
