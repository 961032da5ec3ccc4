"""What GPUs can do, by their makers' data sheets, and what of that our code reaches.

Data sheets: NVIDIA A100 80GB, H100 SXM5, H200 SXM, H20 and DGX B200. Dense bfloat16 FLOP/s, without sparsity; links are
bytes a second in one direction. Memory is what `nvidia-smi` shows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.host import program
from stare_megatron.host.files import read_object

_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """`memory`: bytes; `flops`: dense bf16 FLOP/s; `bandwidth`: of its memory; `nvlink`: to the GPUs of its node;
    `network`: its share of the node's network; `host`: to the host's memory. Bytes/s in one direction."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    nvlink: float
    network: float
    host: float
    per_node: int = 8


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 81920 * _MIB, 312e12, 2.039e12, 300e9, 25e9, 32e9),
        Gpu("h100", 81559 * _MIB, 989e12, 3.35e12, 450e9, 50e9, 64e9),
        Gpu("h200", 143771 * _MIB, 989e12, 4.8e12, 450e9, 50e9, 64e9),
        Gpu("h20", 97871 * _MIB, 148e12, 4.0e12, 450e9, 50e9, 64e9),
        Gpu("b200", 183359 * _MIB, 2250e12, 8.0e12, 900e9, 50e9, 64e9),
    )
}


@dataclass(frozen=True)
class Constants:
    """What a GPU reaches, as shares of its data sheet, and what software costs. `plan --calibrate` measures those that
    one GPU can show.

    `gemm`, `attention`: of the FLOP/s; `bandwidth`: of the memory's; `link`: of NVLink and the network; `host`: of the
    bus to the host; `disk`: bytes/s that a checkpoint is written with, for each rank. `traffic`: bytes that elementwise
    kernels move for each byte a layer keeps. `launch_local`, `launch_engine`: seconds a layer and micro-batch takes of
    the host, forward; with Megatron-Core's own layers and Transformer Engine's. `decode_step`: seconds of an engine's
    step beside its kernels; `eager_layer`: those of each layer on top with `enforce_eager`, by one H200. `outside`:
    bytes of a rank's process that torch does not allocate (CUDA's context, NCCL); `sleeping`: what a sleeping engine
    keeps; `fragmented`: share of the allocated bytes that the allocator wastes.
    """

    gemm: float = 0.70
    attention: float = 0.40
    bandwidth: float = 0.90
    link: float = 0.80
    host: float = 0.40
    disk: float = 1e9
    traffic: float = 2.4
    launch_local: float = 3.7e-3
    launch_engine: float = 1.1e-3
    decode_step: float = 3e-3
    eager_layer: float = 0.9e-3
    outside: float = 2.1 * 2**30
    sleeping: float = 1.5 * 2**30
    fragmented: float = 0.05


CONSTANTS = Constants()


def find(name: str) -> Gpu:
    """A GPU of the table by its name, or by what the driver calls it ("NVIDIA H100 80GB HBM3").

    Raises:
        UserError: none of the table.
    """
    words = re.split(r"[ -]", name.lower())
    known = next((gpu for key, gpu in GPUS.items() if key in words), None)
    if known is None:
        raise UserError(f"--gpu {name}: not in the table of GPUs; known are {', '.join(GPUS)}")
    return known


def write_constants(file: Path, measured: dict[str, float]) -> None:
    """Raises: OSError: `file` cannot be written."""
    file.write_text(json.dumps(measured, indent=2) + "\n")


def read_constants(file: Path) -> Constants:
    """`CONSTANTS` with what `plan --calibrate` measured.

    Raises:
        UserError: unreadable, an unknown name, or no positive number.
    """
    write = f"`{program.called()} plan --calibrate FILE`"
    table = read_object(file, f"; write it with {write}")
    known = {field.name for field in fields(Constants)}
    for name, value in table.items():
        if name not in known or type(value) not in (int, float) or not 0 < value < 1e15:
            raise UserError(
                f"{file}: {name} = {value!r:.40} is no constant of the plan, which are {', '.join(sorted(known))}, "
                f"positive numbers; write it again with {write}"
            )
    return replace(CONSTANTS, **{name: float(value) for name, value in table.items()})
