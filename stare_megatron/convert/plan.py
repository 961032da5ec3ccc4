"""What a conversion is going to do, found out and checked before a byte is written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal

from stare_megatron.convert.mapping import check_fits, mcore_objects, mcore_tensors, pieces
from stare_megatron.convert.source import Kind, Source, check_tokenizer, require_hf
from stare_megatron.convert.tasks import BLOCK_BYTES, HfFile, McoreFile
from stare_megatron.convert.torch_dist import Box, TorchDist
from stare_megatron.errors import UserError
from stare_megatron.host.files import free_bytes
from stare_megatron.models import hf_folder
from stare_megatron.models.entries import hf_names
from stare_megatron.models.families import FAMILIES, read_hf_config
from stare_megatron.models.layout import padded_vocab
from stare_megatron.models.shape import ModelShape
from stare_megatron.models.shards import TORCH_DTYPES
from stare_megatron.models.weights import check, parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FORMAT = 2  # raise it when an interrupted conversion of before must not be gone on with
# Files are kept large, but there are at least a few for each process.
_FILES_A_PROCESS = 2


@dataclass(frozen=True)
class ParallelLayout:
    """The layout a Megatron-Core checkpoint is cut for. Any other can load it too, reading more than its own."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    expert_parallel: int = 1


@dataclass(frozen=True)
class Plan:
    """A conversion. `dtypes`: of the source; `padded_vocab`: rows of the embedding in a Megatron-Core checkpoint;
    `largest`: name and bytes (as written) of the largest tensor; `key`: equal for equal conversions of equal files."""

    source: Source
    to: Kind
    hf: Path
    shape: ModelShape
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    padded_vocab: int
    files: tuple[McoreFile | HfFile, ...]
    tensors: int
    parameters: int
    largest: tuple[str, int]
    tokenizer: str
    key: str

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def lines(self, layout: ParallelLayout) -> list[tuple[str, str]]:
        """The plan in words."""
        names = "/".join(hf_folder.dtype_name(d) for d in self.dtypes)
        cut = f", cut for TP {layout.tensor_parallel}" if self.to is Kind.MCORE else ""
        return [
            ("from", f"{self.source.weights} ({self.source.kind.value}, {self.source.what})"),
            ("to", f"{self.to.value}, {decimal(self.bytes)} in {len(self.files)} file(s){cut}"),
            ("model", f"{FAMILIES[self.shape.family].architecture}, {self.shape.layers} layers, "
             f"{self.parameters / 1e6:,.1f} M parameters, {self.tensors:,} tensors"),
            ("dtype", f"{names} -> {hf_folder.dtype_name(self.dtype)}"),
            ("largest tensor", f"{self.largest[0]}, {self.largest[1] / 1e6:,.1f} MB; in blocks of at most "
             f"{BLOCK_BYTES / 1e6:,.0f} MB"),
            ("configuration", str(self.hf)),
            ("tokenizer", self.tokenizer),
        ]  # fmt: skip


def make_plan(source: Source, *, to: Kind, dtype: str, layout: ParallelLayout, file_bytes: int, processes: int) -> Plan:
    """Read headers and configuration, and check that they belong together.

    `dtype`: a key of DTYPES or "keep". `file_bytes`: of a file of the new checkpoint, at most.

    Raises:
        UserError: an unsupported or damaged checkpoint, one of another model, a layout that does not fit.
    """
    if to is source.kind:
        raise UserError(f"{source.weights}: is a {to.value} checkpoint already")
    hf = require_hf(source)
    shape = read_hf_config(hf)
    shape.check_layout(
        tensor_parallel=layout.tensor_parallel,
        pipeline_parallel=layout.pipeline_parallel,
        virtual_pipeline=layout.virtual_pipeline,
        expert_parallel=layout.expert_parallel,
    )
    found = list(_hf_dtypes(source, shape) if source.kind is Kind.HF else _mcore_dtypes(source, shape, hf))
    if dtype == "keep" and len(found) > 1:
        names = ", ".join(hf_folder.dtype_name(d) for d in found)
        raise UserError(f"{source.weights}: tensors of several dtypes ({names}); choose one with --dtype")
    target = found[0] if dtype == "keep" else DTYPES[dtype]
    names = hf_names(shape)
    specs = [(name, target, want) for name, want in names.items()]
    padded = padded_vocab(shape.vocab, layout.tensor_parallel)
    sizes = {spec[0]: hf_folder.spec_bytes(spec) for spec in specs}
    largest = max(sizes, key=sizes.__getitem__)
    total = sum(sizes.values())
    limit = min(file_bytes, max(total // (processes * _FILES_A_PROCESS), BLOCK_BYTES)) if processes > 1 else file_bytes
    if to is Kind.HF:
        files: Sequence[McoreFile | HfFile] = [
            HfFile(name, tuple(group), sum(map(hf_folder.spec_bytes, group)))
            for name, group in hf_folder.files(specs, limit).items()
        ]
    else:
        files = _mcore_files(shape, target, padded, layout.tensor_parallel, limit)
    return Plan(
        source=source,
        to=to,
        hf=hf,
        shape=shape,
        dtypes=tuple(found),
        dtype=target,
        padded_vocab=padded,
        files=tuple(files),
        tensors=len(names),
        parameters=parameters(shape),
        largest=(largest, sizes[largest]),
        tokenizer=check_tokenizer(hf),
        key=_key(source, hf, to, target, files),
    )


def check_disk(plan: Plan, out: Path, present: int) -> None:
    """Room for the new checkpoint; `present`: bytes of it that an interrupted conversion has written already.

    Raises:
        UserError: too little.
    """
    free, need = free_bytes(out), plan.bytes - present + (64 << 20)
    if free < need:
        raise UserError(f"{out}: {decimal(free)} free on its disk, the checkpoint needs {decimal(need)}")


def _hf_dtypes(source: Source, shape: ModelShape) -> tuple[torch.dtype, ...]:
    """Check every header against the configuration."""
    found = check(source.weights, shape)
    return tuple(dict.fromkeys(TORCH_DTYPES[found[name].dtype] for name in hf_names(shape)))


def _mcore_dtypes(source: Source, shape: ModelShape, hf: Path) -> tuple[torch.dtype, ...]:
    dist = TorchDist(source.weights)
    check_fits(dist, shape, hf / "config.json")
    return tuple(dict.fromkeys(dist.tensors[key].dtype for key in mcore_tensors(shape, torch.float32, 0)))


def _mcore_files(shape: ModelShape, dtype: torch.dtype, padded: int, ranks: int, limit: int) -> list[McoreFile]:
    def size(piece: tuple[str, Box]) -> int:
        return math.prod(piece[1].sizes) * dtype.itemsize

    groups = hf_folder.grouped(pieces(shape, dtype.itemsize, padded, ranks, BLOCK_BYTES), size, limit)
    objects = tuple(mcore_objects(shape))
    return [
        McoreFile(f"__{i}_0.distcp", tuple(group), objects if i == 0 else (), sum(map(size, group)))
        for i, group in enumerate(groups)
    ]


def _key(source: Source, hf: Path, to: Kind, dtype: torch.dtype, files: Sequence[McoreFile | HfFile]) -> str:
    """Of everything that decides what the new files hold."""
    stats: Mapping[str, object] = {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for folder in {source.weights, hf}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    tree = [_FORMAT, str(source.weights.absolute()), stats, to.value, str(dtype), [(f.name, f.bytes) for f in files]]
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()
