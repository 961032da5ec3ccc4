"""Write the policy as a Hugging Face checkpoint: safetensors under the names it was read from, config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from stare_megatron.errors import RunError

SHARD_BYTES = 5 * 10**9
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")

Spec = tuple[str, torch.dtype, tuple[int, ...]]


def export_hf(folder: Path, source: Path, specs: Sequence[Spec], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Rank 0 writes; all ranks run through `tensors`. A collective; `folder` appears whole or not at all.

    `source`: the checkpoint the run began with; everything but its weights is copied. An existing `folder` is replaced.

    Raises:
        RunError: the files cannot be written; on every rank.
    """
    fault = ""
    if dist.get_rank() == 0:
        try:
            _write(folder, source, specs, tensors)
        except OSError as e:
            fault = f"{folder}: cannot write the exported policy: {e}"
    for _ in tensors:  # the other ranks, and rank 0 after a fault: each tensor is gathered by all
        pass
    faults = [fault]
    dist.broadcast_object_list(faults, src=0)
    if faults[0]:
        raise RunError(faults[0])


def _files(specs: Sequence[Spec]) -> list[list[Spec]]:
    """Consecutive tensors of up to SHARD_BYTES a file."""
    files: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        _, dtype, shape = spec
        own = torch.Size(shape).numel() * dtype.itemsize
        if files[-1] and size + own > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += own
    return files


def _write(folder: Path, source: Path, specs: Sequence[Spec], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, partial / file.name)
    _set_dtype(partial / "config.json", specs[0][1])
    files = _files(specs)
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    weight_map: dict[str, str] = {}
    for file, content in zip(names, files, strict=True):
        # `export` may reuse or view larger buffers; safetensors wants tensors with storage of their own.
        held = {
            name: tensor.cpu().clone() for (name, tensor), _ in zip(_take(tensors, len(content)), content, strict=True)
        }
        save_file(held, partial / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    if len(files) > 1:
        total = sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    stale = folder.with_name(folder.name + ".stale.partial")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    partial.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def _take(tensors: Iterator[tuple[str, torch.Tensor]], n: int) -> Iterator[tuple[str, torch.Tensor]]:
    for _ in range(n):
        yield next(tensors)


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Record the dtype the weights are written in, under the key the file uses."""
    tree = json.loads(config.read_text())
    key = "torch_dtype" if "torch_dtype" in tree else "dtype"
    tree[key] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(tree, indent=2))
