"""Where the parties of a sharded push are, and so what carries weights between two of them."""

from __future__ import annotations

import enum
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stare_megatron.errors import RunError

if TYPE_CHECKING:
    import torch


class Carrier(enum.Enum):
    """What carries weights from a trainer rank to an engine worker."""

    MAPPED = "memory of the host that both map"
    IPC = "memory of the GPU that both use"
    NCCL = "NCCL"
    GLOO = "gloo"

    @property
    def in_place(self) -> bool:
        """The receiver reads what is sent where the sender has it."""
        return self in (Carrier.MAPPED, Carrier.IPC)


@dataclass(frozen=True)
class Place:
    """`machine`: same for processes that can map each other's memory; `gpu`: UUID of the one that a process has its
    weights on, empty on a CPU."""

    machine: str
    gpu: str = ""

    def distance(self, other: Place) -> int:
        """0: the same memory; 1: one machine; 2: the network is between them."""
        if self.machine != other.machine:
            return 2
        return int(self.gpu != other.gpu)


def carrier(sender: Place, worker: Place) -> Carrier:
    """What carries weights from a trainer rank to an engine worker.

    Raises:
        RunError: one is on a GPU and the other is not.
    """
    if bool(sender.gpu) != bool(worker.gpu):
        raise RunError(
            f"weight push: a trainer rank on {_named(sender)} and an engine worker on {_named(worker)} have no memory "
            "in common; run both on GPUs, or both on CPUs (STARE_DEVICE)"
        )
    near = sender.distance(worker) == 0
    if sender.gpu:
        return Carrier.IPC if near else Carrier.NCCL
    return Carrier.MAPPED if near else Carrier.GLOO


def _named(place: Place) -> str:
    return f"GPU {place.gpu}" if place.gpu else "a CPU"


def place(device: torch.device) -> Place:
    """Of this process, whose weights are on `device`."""
    import torch

    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return Place(machine(), gpu)


def machine() -> str:
    """Of one machine, user and process namespace."""
    parts = [platform.node(), str(os.getuid())]
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        path = Path(file)
        parts.append(os.readlink(path) if path.is_symlink() else path.read_text().strip())
    return "/".join(parts)
