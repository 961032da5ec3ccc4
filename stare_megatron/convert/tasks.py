"""The work of one process: write one file of the new checkpoint, block by block."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from stare_megatron.convert.mapping import HfAsMcore, McoreAsHf
from stare_megatron.convert.torch_dist import Box, Stored, TorchDist, save_object
from stare_megatron.host import manifest
from stare_megatron.host.files import write_atomic
from stare_megatron.models.hf_folder import SafetensorsWriter, Spec
from stare_megatron.models.shape import ModelShape

# Bytes of a block: what is in memory of one tensor at a time, twice or three times over.
BLOCK_BYTES = 128 << 20
RECORDS = ".progress"


@dataclass(frozen=True)
class McoreFile:
    """A `*.distcp` file to write: blocks of tensors, and empty objects."""

    name: str
    pieces: tuple[tuple[str, Box], ...]
    objects: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class HfFile:
    """A safetensors file to write."""

    name: str
    specs: tuple[Spec, ...]
    bytes: int


@dataclass(frozen=True)
class Job:
    """What all files of a conversion have in common. `source`: the folder with the tensors; `out`: where files go."""

    source: Path
    out: Path
    shape: ModelShape
    dtype: torch.dtype


@dataclass(frozen=True)
class Done:
    """A file that was written. `stored`: what lies where, for a `*.distcp` file."""

    name: str
    entry: manifest.FileEntry
    stored: tuple[Stored, ...]


@dataclass(frozen=True)
class Written:
    """`Done`, and the most memory the process had held when it was: resident bytes, before its first file and now."""

    done: Done
    base_bytes: int
    peak_bytes: int


# Of a worker process: bytes written by all of them, and memory before the first file.
_progress: Synchronized[int] | None = None
_base = 0


def start(progress: Synchronized[int]) -> None:
    """Count what this process writes in `progress`, and its memory from here."""
    global _progress, _base
    _progress, _base = progress, peak_bytes()


def start_process(progress: Synchronized[int]) -> None:
    """The same for a worker process. Each computes with one thread: there is one process a core."""
    torch.set_num_threads(1)
    start(progress)


def peak_bytes() -> int:
    """Most memory this process has held, resident, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def advance(n: int) -> None:
    if _progress is not None:
        with _progress.get_lock():
            _progress.value += n


def write_file(job: Job, file: McoreFile | HfFile) -> Written:
    """Write one file and the record that it is complete.

    Raises:
        UserError: the source is damaged or of another model.
        OSError: the file cannot be written.
    """
    done = _write_mcore(job, file) if isinstance(file, McoreFile) else _write_hf(job, file)
    record = job.out / RECORDS / f"{file.name}.json"
    write_atomic(record, json.dumps(dataclasses.asdict(done)))
    return Written(done, _base, peak_bytes())


def _write_mcore(job: Job, file: McoreFile) -> Done:
    source = HfAsMcore(job.source, job.shape)
    stored = []
    with (job.out / file.name).open("wb") as raw:
        stream = manifest.HashingWriter(raw)

        def put(key: str, box: Box | None, value: Any) -> None:
            begin = stream.tell()
            save_object(value, stream)
            stored.append(Stored(key, box, file.name, begin, stream.tell() - begin))

        for key in file.objects:
            put(key, None, [None])
        for key, box in file.pieces:
            value = source.read(key, box, job.dtype)
            put(key, box, value)
            advance(value.nbytes)
        raw.flush()
        os.fsync(raw.fileno())
    return Done(file.name, stream.entry(), tuple(stored))


def _write_hf(job: Job, file: HfFile) -> Done:
    source = McoreAsHf(TorchDist(job.source), job.shape)
    with SafetensorsWriter(job.out / file.name, file.specs) as writer:
        for name, dtype, shape in file.specs:
            for first, last in blocks(shape, dtype.itemsize):
                rows = source.read(name, first, last, dtype)
                writer.write(rows)
                advance(rows.nbytes)
    return Done(file.name, writer.entry(), ())


def blocks(shape: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    """Ranges of rows of at most BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // (math.prod(shape[1:]) * itemsize))
    return [(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def read_record(file: Path) -> Done | None:
    """What an earlier, interrupted conversion wrote; None where it did not get so far."""
    try:
        tree = json.loads(file.read_text())
    except OSError:
        return None
    stored = tuple(
        Stored(s["key"], Box(tuple(s["box"]["offsets"]), tuple(s["box"]["sizes"])) if s["box"] else None,
               s["file"], s["offset"], s["length"])
        for s in tree["stored"]
    )  # fmt: skip
    return Done(tree["name"], manifest.FileEntry(**tree["entry"]), stored)
