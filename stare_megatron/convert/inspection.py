"""What a checkpoint holds, and how two differ. Reads headers; tensors only for checksums and differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from rich.filesize import decimal

from stare_megatron.convert.mapping import McoreAsHf, check_fits
from stare_megatron.convert.source import Kind, Source, check_tokenizer
from stare_megatron.convert.tasks import blocks
from stare_megatron.convert.torch_dist import Box, TorchDist
from stare_megatron.host import manifest
from stare_megatron.models.entries import hf_names
from stare_megatron.models.families import FAMILIES, read_hf_config
from stare_megatron.models.hf_folder import dtype_name
from stare_megatron.models.shape import ModelShape
from stare_megatron.models.shards import Checkpoint, TensorInfo
from stare_megatron.models.weights import check, read_headers

OPTIMIZER = "optimizer."
# What content_metadata's layout counts, in its order (trainer/checkpoint.py).
_LAYOUT = ("ranks", "TP", "PP", "VPP", "CP", "EP")


class Tensors(Protocol):
    """Named tensors that can be read by blocks of their first axis."""

    @property
    def infos(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str, first: int, last: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class HfTensors:
    """A Hugging Face checkpoint as it is."""

    file: Checkpoint

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: self.file.info(name) for name in self.file.names}

    def read(self, name: str, first: int, last: int) -> torch.Tensor:
        value = self.file.read(name, self.file.info(name).shape, slice(first, last)).clone()
        self.file.release()
        return value


@dataclass(frozen=True)
class McoreTensors:
    """A Megatron-Core checkpoint as it is; `optimizer`: with the tensors of the optimizer."""

    dist: TorchDist
    optimizer: bool

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {
            key: info
            for key, info in sorted(self.dist.tensors.items())
            if self.optimizer or not key.startswith(OPTIMIZER)
        }

    def read(self, name: str, first: int, last: int) -> torch.Tensor:
        shape = self.dist.tensors[name].shape
        return self.dist.read(name, Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))


@dataclass(frozen=True)
class McoreUnderHfNames:
    """The model of a Megatron-Core checkpoint as Hugging Face tensors."""

    dist: TorchDist
    shape: ModelShape

    @property
    def infos(self) -> dict[str, TensorInfo]:
        dtype = next(i.dtype for key, i in self.dist.tensors.items() if not key.startswith(OPTIMIZER))
        return {name: TensorInfo(dtype, want) for name, want in hf_names(self.shape).items()}

    def read(self, name: str, first: int, last: int) -> torch.Tensor:
        return McoreAsHf(self.dist, self.shape).read(name, first, last, self.infos[name].dtype)


def tensors(source: Source, *, optimizer: bool) -> Tensors:
    """Under the names the checkpoint uses itself.

    Raises:
        UserError: it is damaged.
    """
    if source.kind is Kind.HF:
        return HfTensors(Checkpoint(source.weights))
    return McoreTensors(TorchDist(source.weights), optimizer)


def comparable(one: Source, other: Source, *, optimizer: bool) -> tuple[Tensors, Tensors]:
    """Two checkpoints under the same names: Hugging Face's where one of them is such.

    Raises:
        UserError: damaged, or a Megatron-Core checkpoint whose config.json is not known, or of another model than it.
    """
    if one.kind is other.kind:
        return tensors(one, optimizer=optimizer), tensors(other, optimizer=optimizer)
    hf = (one if one.kind is Kind.HF else other).weights
    pair = [HfTensors(Checkpoint(s.weights)) if s.kind is Kind.HF else _renamed(s, s.hf or hf) for s in (one, other)]
    return pair[0], pair[1]


def _renamed(source: Source, hf: Path) -> McoreUnderHfNames:
    dist, shape = TorchDist(source.weights), read_hf_config(hf)
    check_fits(dist, shape, hf / "config.json")
    return McoreUnderHfNames(dist, shape)


def checksum(source: Tensors, name: str, info: TensorInfo, progress: Callable[[int], object] = int) -> str:
    """XXH3 (128 bit) of a tensor's bytes: equal for equal tensors of either kind of checkpoint, under one name."""
    state = xxhash.xxh3_128()
    for first, last in blocks(info.shape, info.dtype.itemsize):
        value = source.read(name, first, last).contiguous()
        state.update(value.flatten().view(torch.uint8).numpy().data)
        progress(value.nbytes)
    return state.hexdigest()


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both. `largest`: of |a - b| over all elements in float64, NaN where one has a
    NaN that the other has not; None where it was not computed because names or shapes differ."""

    name: str
    what: str
    largest: float | None


def differences(one: Tensors, other: Tensors, progress: Callable[[int], object] = int) -> Iterator[Difference]:
    """Every tensor that differs in name, shape, dtype or value; reads both checkpoints once."""
    left, right = one.infos, other.infos
    for name in sorted(left.keys() | right.keys()):
        a, b = left.get(name), right.get(name)
        if a is None or b is None:
            yield Difference(name, "only in the second" if a is None else "only in the first", None)
        elif a.shape != b.shape:
            yield Difference(name, f"shape {list(a.shape)} and {list(b.shape)}", None)
        else:
            same, largest = True, 0.0
            for first, last in blocks(a.shape, a.dtype.itemsize):
                x, y = one.read(name, first, last), other.read(name, first, last)
                if not torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)):
                    same = False
                    # A maximum that keeps a NaN.
                    largest = torch.maximum(torch.tensor(largest), _distance(x, y)).item()
                progress(x.nbytes)
            if a.dtype != b.dtype:
                yield Difference(name, f"dtype {dtype_name(a.dtype)} and {dtype_name(b.dtype)}", largest)
            elif not same:
                yield Difference(name, "values", largest)


def _distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Largest |x - y|, float64; equal infinities and NaNs at the same place are no distance."""
    a, b = x.flatten(), y.flatten()
    most = torch.zeros((), dtype=torch.float32)
    for start in range(0, len(a), 1 << 22):
        p, q = a[start : start + (1 << 22)].double(), b[start : start + (1 << 22)].double()
        same = (p == q) | (p.isnan() & q.isnan())
        most = torch.maximum(most, (p - q).abs().masked_fill(same, 0.0).max().float())
    return most


def facts(source: Source) -> list[tuple[str, str]]:
    """What a checkpoint is: kind, step, layout it was saved at, model, files, tokenizer, manifest.

    Raises:
        UserError: it is damaged, or its parts do not belong together.
    """
    lines = [("checkpoint", f"{source.weights}"), ("kind", f"{source.kind.value}, {source.what}")]
    shape = None if source.hf is None else read_hf_config(source.hf)
    if source.kind is Kind.MCORE:
        dist = TorchDist(source.weights)
        if source.hf is not None and shape is not None:
            check_fits(dist, shape, source.hf / "config.json")
        lines += _common(dist.common())
        files = dist.files
        state = sum(info.bytes for key, info in dist.tensors.items() if key.startswith(OPTIMIZER))
        if state:
            lines.append(("optimizer", f"{decimal(state)} of state"))
    else:
        headers = read_headers(source.weights) if shape is None else check(source.weights, shape)
        files = {stored.file for stored in headers.values()}
    size = sum((source.weights / name).stat().st_size for name in files)
    lines.append(("files", f"{len(files)}, {decimal(size)}"))
    if source.hf is not None and shape is not None:
        lines += [("configuration", str(source.hf / "config.json")), ("model", _model(shape))]
        lines.append(("tokenizer", check_tokenizer(source.hf)))
    listed = manifest.read(source.root)
    lines.append((manifest.NAME, f"{len(listed)} files" if listed is not None else "none"))
    return lines


def _common(common: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [(name.replace("_", " "), str(common[name])) for name in ("step", "optimizer_steps") if name in common]
    content = common.get("content_metadata")
    if isinstance(content, dict) and isinstance(content.get("layout"), list):
        lines.append(("saved at", ", ".join(f"{n} {v}" for n, v in zip(_LAYOUT, content["layout"], strict=False))))
    if isinstance(content, dict) and "converted_from" in content:
        lines.append(("converted", f"from {content['converted_from']}, cut for TP {content['tensor_parallel']}"))
    return lines


def _model(shape: ModelShape) -> str:
    experts = f", {shape.experts.number} experts (top {shape.experts.top_k})" if shape.experts else ""
    tied = "tied" if shape.tied else "untied"
    return (
        f"{FAMILIES[shape.family].architecture}: {shape.layers} layers, hidden {shape.hidden}, MLP {shape.ffn}, "
        f"{shape.heads} heads of {shape.head_dim} in {shape.kv_groups} groups{experts}, vocabulary {shape.vocab:,} "
        f"({tied})"
    )


def summary(infos: dict[str, TensorInfo]) -> list[tuple[str, str]]:
    """Tensors and parameters, by dtype."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for info in infos.values():
        by_dtype.setdefault(info.dtype, []).append(info.bytes // info.dtype.itemsize)
    return [
        ("tensors", f"{len(sizes):,} of {dtype_name(dtype)}, {sum(sizes) / 1e6:,.1f} M elements")
        for dtype, sizes in by_dtype.items()
    ]
