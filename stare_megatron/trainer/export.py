"""Write the policy as a Hugging Face checkpoint: safetensors under the names it was read from, config and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from stare_megatron.errors import RunError
from stare_megatron.host import manifest
from stare_megatron.host.files import whole_folder
from stare_megatron.models.hf_folder import SafetensorsWriter, Spec, copy_companions, files, write_index

SHARD_BYTES = 5 * 10**9


def export_hf(folder: Path, source: Path, specs: Sequence[Spec], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Rank 0 writes; all ranks run through `tensors`. A collective; `folder` appears whole or not at all.

    `source`: the checkpoint the run began with; everything but its weights is copied. An existing `folder` is replaced.

    Raises:
        RunError: the files cannot be written; on every rank.
    """
    fault = ""
    if dist.get_rank() == 0:
        try:
            with whole_folder(folder) as partial:
                _write(partial, source, specs, tensors)
        except OSError as e:
            fault = f"{folder}: cannot write the exported policy: {e}"
    for _ in tensors:  # the other ranks, and rank 0 after a fault: each tensor is gathered by all
        pass
    faults = [fault]
    dist.broadcast_object_list(faults, src=0)
    if faults[0]:
        raise RunError(faults[0])


def _write(partial: Path, source: Path, specs: Sequence[Spec], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    copy_companions(source, partial, specs[0][1])
    content = files(specs, SHARD_BYTES)
    sums: dict[str, manifest.FileEntry] = {}
    for file, group in content.items():
        with SafetensorsWriter(partial / file, group) as writer:
            for spec, (name, tensor) in zip(group, tensors, strict=False):
                if name != spec[0]:
                    raise RuntimeError(f"{name} came where {spec[0]} was announced")
                writer.write(tensor)
        sums[file] = writer.entry()
    write_index(partial, content)
    manifest.write(partial, sums)
