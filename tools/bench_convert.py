"""Conversion of a checkpoint beside safetensors' own load and save of the same bytes, by turns in one run.

python tools/bench_convert.py [HUGGING FACE FOLDER] [--rounds N] [--processes N]

Both ways, as the command is typed: with the start of its processes and, of the source, its check against the manifest
where there is one. Load and save is measured in this process, its imports left out, and in one of its own. Without a
folder: a Qwen2 of 536 million random parameters in bfloat16, tied. Times are of what lies in the page cache.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from stare_megatron.models.entries import hf_names
from stare_megatron.models.families import read_hf_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bench_push import CONFIG, DTYPE


class Used(NamedTuple):
    """Seconds by the clock and of processors, children included."""

    wall: float
    cpu: float


def make(folder: Path) -> Path:
    """A random checkpoint of `bench_push`'s model; returns its folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "bfloat16"}))
    names = hf_names(read_hf_config(folder))
    tensors = {name: (torch.randn(want) * 0.02).to(DTYPE) for name, want in names.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def used(work: Callable[[], None]) -> Used:
    """What `work` takes."""

    def seconds() -> float:
        of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(r.ru_utime + r.ru_stime for r in of)

    began, before = time.perf_counter(), seconds()
    work()
    return Used(time.perf_counter() - began, seconds() - before)


def load_and_save(source: Path, out: Path) -> None:
    """Every weights file read and written as it is."""
    out.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), out / file.name, metadata={"format": "pt"})


def in_a_process(source: Path, out: Path) -> None:
    """`load_and_save` with the start of Python and of safetensors, and nothing of ours."""
    imports = "import sys\nfrom pathlib import Path\nfrom safetensors.torch import load_file, save_file\n"
    code = f"{imports}{inspect.getsource(load_and_save)}load_and_save(*map(Path, sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, str(source), str(out)], check=True)


def convert(source: Path, out: Path, processes: int) -> None:
    """The command."""
    command = [sys.executable, "-m", "stare_megatron", "convert", str(source), str(out), "--quiet"]
    subprocess.run([*command, "--processes", str(processes)], check=True)


def measure(source: Path, here: Path, rounds: int, processes: int) -> dict[str, list[Used]]:
    """Of each way a figure a round, by turns; the folders are removed."""
    megatron = here / "megatron"
    convert(source, megatron, processes)
    ways: dict[str, Callable[[Path], None]] = {
        "safetensors, load and save": lambda out: load_and_save(source, out),
        "the same in a process": lambda out: in_a_process(source, out),
        "to Megatron-Core": lambda out: convert(source, out, processes),
        "to Hugging Face": lambda out: convert(megatron, out, processes),
    }
    found: dict[str, list[Used]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            out = here / "out"
            found[way].append(used(lambda work=work, out=out: work(out)))
            shutil.rmtree(out)
    return found


def show(found: dict[str, list[Used]], size: int, console: Console) -> None:
    """A line a way, medians; ratios are of each round's own load and save."""
    table = Table("", "s", "CPU s", "MB/s", "of load and save", "CPU")
    base = next(iter(found.values()))
    for way, rounds in found.items():
        wall, cpu = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        ratios = [statistics.median(r[i] / b[i] for r, b in zip(rounds, base, strict=True)) for i in (0, 1)]
        figures = (f"{wall:.2f}", f"{cpu:.2f}", f"{size / 1e6 / wall:,.0f}", *(f"{ratio:.2f}" for ratio in ratios))
        table.add_row(way, *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="a Hugging Face checkpoint in safetensors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of a conversion")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as made:
        here = Path(made)
        source = args.source or make(here / "source")
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        load = f"load {os.getloadavg()[0]:.1f}"
        print(f"{platform.machine()}, {os.cpu_count()} CPUs, {load}; {size / 1e6:,.0f} MB, {args.rounds} rounds")
        show(measure(source, here, args.rounds, args.processes), size, Console(width=120))


if __name__ == "__main__":
    main()
