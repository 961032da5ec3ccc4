"""What of a process is still in a device's memory, when more of it is than should be."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch

_SHOWN = 8


def largest(place: torch.device, names: Mapping[int, str]) -> list[str]:
    """The largest storages that Python still refers to on a device, "12.0 MiB float32 [1024, 3072] (gradients)".

    `names`: what storages are known to be, by address.
    """
    found: dict[int, torch.Tensor] = {}
    for thing in gc.get_objects():
        # Not by isinstance, which runs the code of objects that pretend to be another class.
        if not issubclass(type(thing), torch.Tensor) or thing.device != place or thing.layout is not torch.strided:
            continue
        address = thing.untyped_storage().data_ptr()
        if address and (address not in found or thing.numel() > found[address].numel()):
            found[address] = thing
    ordered = sorted(found.items(), key=lambda item: -item[1].untyped_storage().nbytes())
    return [_line(tensor, names.get(address, "")) for address, tensor in ordered[:_SHOWN]]


def _line(tensor: torch.Tensor, name: str) -> str:
    size = tensor.untyped_storage().nbytes() / 2**20
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{size:,.1f} MiB {kind} {list(tensor.shape)}{f' ({name})' if name else ''}"
