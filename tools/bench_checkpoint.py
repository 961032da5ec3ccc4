"""What a training checkpoint costs: how long it holds up the loop, written in the background and not, how long it takes
to come back, and the memory of it, in one run on the same machine.

torchrun --standalone --nproc-per-node 2 tools/bench_checkpoint.py run.toml trainer.tensor_parallel=2

The configuration gives model, layout and batch, as for tools/bench_trainer.py; folders are made under `run.dir` and
removed. Between saves the ranks take training steps, so that the state changes under a save in the background.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from bench_trainer import load, make_rank
from rich.console import Console
from rich.table import Table

from stare_megatron import config as configuration
from stare_megatron.config import Config
from stare_megatron.errors import UserError
from stare_megatron.host import device, manifest, memory
from stare_megatron.run.folder import hardware, package_versions, parameter_count
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import Control

_ROUNDS = 4  # of each kind; the first is left out


@dataclass(frozen=True)
class Held:
    """Most memory that a rank held beyond what it held before, bytes; the largest of all ranks'."""

    host: int
    device: int


@dataclass
class Seconds:
    """Of one save. `begin`, `copy` (an update waits for the copy of the state) and `finish` hold the loop up; `open`:
    from the first to the last byte; `steps`: training steps taken meanwhile, without that wait."""

    begin: float
    copy: float
    finish: float
    open: float
    steps: list[float]
    held: Held

    @property
    def stall(self) -> float:
        return self.begin + self.copy + self.finish


def step(trainer: TrainerRank, config: Config) -> float:
    """Seconds of one training step."""
    began = time.perf_counter()
    load(trainer, config, 0)
    trainer.update(Control(False, 1.0, 1.0, trainer.score().entropy, 0.0))
    return time.perf_counter() - began


def written(trainer: TrainerRank) -> bool:
    """On every rank."""
    flag = torch.tensor([int(trainer.save_written())], device=device.torch_device(int(os.environ["LOCAL_RANK"])))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


@contextlib.contextmanager
def copy_waits() -> Iterator[list[float]]:
    """The seconds of each wait of an update for a copy, while this lasts."""
    from stare_megatron.trainer.writing import Writing  # its imports come after the patches

    wait, seconds = Writing.copied, []

    def copied(writing: Writing) -> None:
        began = time.perf_counter()
        wait(writing)
        seconds.append(time.perf_counter() - began)

    with mock.patch.object(Writing, "copied", copied):
        yield seconds


class Watch:
    """The memory this process holds from now on. Of host memory the resident, by the kernel's high-water mark."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        (self._host,) = memory.status_bytes(os.getpid(), "VmRSS")
        self._device = 0
        if device.current() is device.Device.CUDA:
            torch.cuda.reset_peak_memory_stats()
            self._device = torch.cuda.memory_allocated()

    def most(self) -> Held:
        """A collective."""
        (host,) = memory.status_bytes(os.getpid(), "VmHWM")
        on_device = torch.cuda.max_memory_allocated() if device.current() is device.Device.CUDA else 0
        own: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(own, (host - self._host, on_device - self._device))
        return Held(*map(max, zip(*own, strict=True)))


def save(trainer: TrainerRank, config: Config, folder: Path, *, background: bool) -> Seconds:
    watch = Watch()
    dist.barrier()
    began = time.perf_counter()
    trainer.begin_save(folder, 1, snapshot=background)
    begun = time.perf_counter()
    steps: list[float] = []
    waited = 0.0
    while background and not written(trainer):
        with copy_waits() as waits:
            took = step(trainer, config)
        waited += sum(waits)
        steps.append(took - sum(waits))
    ready = time.perf_counter()
    entries: list[dict[str, manifest.FileEntry]] = [{}] * dist.get_world_size()
    dist.all_gather_object(entries, trainer.finish_save())
    if dist.get_rank() == 0:
        manifest.write(folder, {name: entry for of_rank in entries for name, entry in of_rank.items()})
    dist.barrier()
    done = time.perf_counter()
    return Seconds(begun - began, waited, done - ready, done - began, steps, watch.most())


def restore(trainer: TrainerRank, folder: Path) -> tuple[float, Held]:
    """Seconds and memory of loading what was saved, by a trainer that has its buffers already."""
    watch = Watch()
    dist.barrier()
    began = time.perf_counter()
    trainer.restore(folder)
    dist.barrier()
    return time.perf_counter() - began, watch.most()


@dataclass
class Found:
    """Saves at once, saves in the background, restores, steps without a save, bytes of a checkpoint."""

    at_once: list[Seconds]
    background: list[Seconds]
    restores: list[tuple[float, Held]]
    alone: list[float]
    size: int


def measure(config: Config) -> Found:
    rank = int(os.environ["RANK"])
    trainer = make_rank(config)
    names = [tempfile.mkdtemp(prefix="bench-checkpoint-", dir=config.run.dir) if rank == 0 else ""]
    dist.broadcast_object_list(names, src=0)
    root = Path(names[0])
    found = Found([], [], [], [step(trainer, config)], 0)
    for number in range(_ROUNDS):
        for saves, kind in ((found.at_once, False), (found.background, True)):
            folder = root / f"{number}-{kind}"
            saves.append(save(trainer, config, folder, background=kind))
            found.alone.append(step(trainer, config))
            if not kind:
                found.restores.append(restore(trainer, folder))
            dist.barrier()
            if rank == 0:
                found.size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                shutil.rmtree(folder)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(root)
    trainer.close()
    return Found(found.at_once[1:], found.background[1:], found.restores[1:], found.alone[1:], found.size)


def main(argv: list[str]) -> int:
    if "RANK" not in os.environ:
        print("bench_checkpoint: start it with torchrun (see its first lines)", file=sys.stderr)
        return 2
    os.environ.update(device.trainer_environment())
    try:
        config = configuration.load(Path(argv[0]), [*argv[1:], f"trainer.world_size={os.environ['WORLD_SIZE']}"])
        config.run.dir.mkdir(parents=True, exist_ok=True)
        parameters = parameter_count(config.model.path)
    except UserError as e:
        print(f"bench_checkpoint: {e}", file=sys.stderr)
        return 2
    found = measure(config)
    if int(os.environ["RANK"]) == 0:
        show(found, parameters)
    return 0


def show(found: Found, parameters: int) -> None:
    def median(values: list[float]) -> str:
        return f"{np.median(values):.3f}" if values else "-"

    def held(values: list[Held]) -> tuple[str, str]:
        host, on_device = (np.median([getattr(h, field) for h in values]) / 1e6 for field in ("host", "device"))
        return f"{host:,.0f}", f"{on_device:,.0f}"

    table = Table(
        title=f"{parameters / 1e6:,.0f} M parameters, {found.size / 1e6:,.0f} MB, medians of {_ROUNDS - 1}, seconds; "
        "MB that the rank with the most held beyond what it held before"
    )
    for heading in ("", "begin", "copy", "finish", "loop held up", "whole", "step meanwhile", "host MB", "device MB"):
        table.add_column(heading, justify="right")
    for name, saves in (("saved at once", found.at_once), ("in background", found.background)):
        columns = ([getattr(s, field) for s in saves] for field in ("begin", "copy", "finish", "stall", "open"))
        steps = median([x for s in saves for x in s.steps])
        table.add_row(name, *map(median, columns), steps, *held([s.held for s in saves]))
    seconds = median([took for took, _ in found.restores])
    table.add_row("restored", "", "", "", seconds, seconds, "", *held([h for _, h in found.restores]))
    ratio = np.median([s.stall for s in found.background]) / np.median([s.stall for s in found.at_once])
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    console = Console(width=120)
    console.print(table)
    console.print(
        f"in the background the loop is held up {ratio:.1%} as long; a step without a save: {median(found.alone)} s"
    )
    console.print(f"{hardware()}; {versions}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
