"""Compile the Triton kernels for NVIDIA GPUs that need not be there, and show what came out.

python tools/inspect_kernels.py [--json] [CAPABILITY...]      default: 80 90 100 (A100, H100 and H200, B200)

Registers and bytes spilled are those of a thread, by NVIDIA's assembler, which comes with Triton. Wide loads and stores
move 128 bits; `bytes` are those of logits that a thread reads in a step of the main loop and one of the rest (forward)
or in all (backward, which also has the branch that writes zeros). `exponentials` is the number of ex2 instructions an
element, outside of what is done once; `instructions` that of all machine instructions an element in the forward's main
loop.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass

import triton
from rich.console import Console
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stare_megatron.trainer import logprobs_triton as kernels
from stare_megatron.trainer.partials import components

_BYTES = {"bf16": 2, "fp32": 4}
THREADS = {"forward": 32 * kernels.FORWARD_WARPS, "backward": 32 * kernels.BACKWARD_WARPS}
_ALIGNED = [["tt.divisibility", 16]]
_POINTERS = {
    "target": "*i64",
    "out": "*fp32",
    "m": "*fp64",
    "log_s": "*fp64",
    "entropy": "*fp64",
    "grad_logprob": "*fp32",
    "grad_entropy": "*fp32",
}
_FLOATS = {"scale", "inverse_tau"}
# As JIT compilation finds them at a vocabulary of 151,936: multiples of 16.
_MULTIPLES = {"logits", "row_stride", "columns", "valid"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel for one architecture."""

    name: str
    dtype: str
    options: str
    capability: int
    registers: int
    spilled: int
    bytes: int
    wide_loads: int
    wide_stores: int
    exponentials: float
    instructions: float | None


def variants() -> list[tuple[str, str, str, dict[str, int | bool]]]:
    """(kernel, dtype of the logits, what is asked of it, compile-time arguments)."""
    made = []
    for dtype in ("bf16", "fp32"):
        for sensitivity, raw in ((False, False), (True, False), (True, True)):
            options = "sensitivity" * sensitivity + ", raw" * raw
            kinds = components(sensitivity=sensitivity, raw=raw)
            width = kernels.LOAD_BYTES // _BYTES[dtype]
            constants = {"K": kinds, "SENSITIVITY": sensitivity, "RAW": raw, "WIDTH": width}
            constants |= {"GROUPS": kernels.GROUPS, "LANES": kernels.LANES}
            made.append(("forward", dtype, options, constants))
        for entropy in (False, True):
            constants = {"ENTROPY": entropy, "BLOCK": kernels.BACKWARD_BLOCK}
            made.append(("backward", dtype, "entropy gradient" * entropy, constants))
    return made


def compiled(name: str, dtype: str, options: str, constants: dict[str, int | bool], capability: int) -> Compiled:
    function = kernels.partials_kernel if name == "forward" else kernels.backward_kernel
    names = function.arg_names
    signature = dict.fromkeys(names, "i32") | _POINTERS | dict.fromkeys(_FLOATS, "fp32") | {"logits": "*" + dtype}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        function,
        signature={n: signature[n] for n in names},
        constexprs=constants,
        attrs={(names.index(n),): _ALIGNED for n in names if n in _MULTIPLES},
    )
    how = {"num_warps": THREADS[name] // 32, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)
    ptx = binary.asm["ptx"]
    registers, spilled = _usage(binary.asm["cubin"])
    # Forward, the main loop and that of the rest, which takes in one group at a time.
    groups = constants["GROUPS"] if name == "forward" else 0
    tile = (groups + 1) * constants["LANES"] * constants["WIDTH"] if groups else constants["BLOCK"]
    elements = tile // THREADS[name]
    lanes = kernels.LANES // THREADS[name]
    once = lanes * (2 if "raw" in options else 1) if name == "forward" else 0  # the lanes' meeting
    return Compiled(
        name=name,
        dtype=dtype,
        options=options,
        capability=capability,
        registers=registers,
        spilled=spilled,
        bytes=elements * _BYTES[dtype],
        wide_loads=len(re.findall(r"ld\.global\.v4", ptx)),
        wide_stores=len(re.findall(r"st\.global\.v4", ptx)),
        exponentials=(ptx.count("ex2.approx") - once) / elements,
        instructions=_main_loop(binary.asm["cubin"]) / (elements * groups / (groups + 1)) if groups else None,
    )


def _main_loop(cubin: bytes) -> int:
    """Instructions of the longest loop that loads from memory."""
    labels: dict[str, int] = {}
    found: list[str] = []
    longest = 0
    for line in _shown(knobs.nvidia.nvdisasm.path, "-c", cubin=cubin).splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction[1])
            back = re.search(r"\bBRA\b.*(\.L_\w+)", instruction[1])
            body = found[labels[back[1]] :] if back and back[1] in labels else []
            if any("LDG" in each for each in body):
                longest = max(longest, len(body))
    return longest


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) a thread."""
    shown = _shown(knobs.nvidia.cuobjdump.path, "-res-usage", cubin=cubin)

    def number(key: str) -> int:
        return int(re.findall(rf"\b{key}:(\d+)", shown)[0])

    return number("REG"), number("STACK") + number("LOCAL")


def _shown(*command: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("capability", type=int, nargs="*", default=[80, 90, 100])
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    found = [compiled(*variant, capability) for capability in asked.capability for variant in variants()]
    if asked.json:
        print(json.dumps([asdict(one) for one in found]))
        return
    console = Console(width=120)
    console.print(f"triton {triton.__version__}")
    table = Table(
        "sm",
        "kernel",
        "logits",
        "with",
        "registers",
        "spilled B",
        "bytes",
        "wide loads",
        "stores",
        "ex2",
        "instructions",
    )
    for one in found:
        columns = (one.capability, one.name, one.dtype, one.options, one.registers, one.spilled, one.bytes)
        instructions = "" if one.instructions is None else f"{one.instructions:.2f}"
        table.add_row(*map(str, (*columns, one.wide_loads, one.wide_stores)), f"{one.exponentials:.2f}", instructions)
    console.print(table)


if __name__ == "__main__":
    main()
