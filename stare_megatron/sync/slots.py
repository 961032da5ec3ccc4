"""Buffers of trainer ranks that engine workers read where they are: memory of the host, or of a GPU that both use.

Torch only. What travels of them are plain values, such as JSON can hold.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing import reductions

SLOTS = 2
"""Messages a sender may have under way."""

_HEAD = 6  # of what `reduce_tensor` gives: classes, sizes and dtype, which are always the same here


class Slots:
    """A sender's buffers, in host memory that others can map: `tensors` are uint8 [bytes]."""

    def __init__(self, size: int) -> None:
        # Memory without a name: it goes with the last process that has it, and no limit of /dev/shm holds for it.
        self._file = os.memfd_create("weights")
        os.truncate(self._file, SLOTS * size)
        self.tensors = _mapped(self._file, size)
        self.address = (os.getpid(), self._file, size)

    @staticmethod
    def at(address: Sequence[int]) -> list[torch.Tensor]:
        """Another process's.

        Raises:
            OSError: they cannot be mapped.
        """
        pid, number, size = address
        file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        try:
            return _mapped(file, size)
        finally:
            os.close(file)


def _mapped(file: int, size: int) -> list[torch.Tensor]:
    return list(torch.frombuffer(mmap.mmap(file, SLOTS * size), dtype=torch.uint8).split(size))


class GpuSlots:
    """A sender's buffers in its GPU's memory: `tensors` are uint8 [bytes].

    torch keeps the memory until everyone who was given a `handle` has dropped what `at` made of it.
    """

    def __init__(self, size: int, where: torch.device) -> None:
        self._size = size
        self._whole = torch.empty(SLOTS * size, dtype=torch.uint8, device=where)
        self.tensors = list(self._whole.split(size))

    def handle(self) -> list[Any]:
        """For one process that uses the same GPU, which must take it: torch counts them."""
        _, arguments = reductions.reduce_tensor(self._whole)
        return [self._size, *(a.hex() if isinstance(a, bytes) else a for a in arguments[_HEAD:])]

    @staticmethod
    def at(handle: Sequence[Any], where: torch.device) -> list[torch.Tensor]:
        """Another process's. `where`: how the GPU is called here."""
        size, _, memory, total, offset, grad, counter, place, event, wait = handle
        whole = reductions.rebuild_cuda_tensor(
            torch.Tensor,
            (SLOTS * size,),
            (1,),
            0,
            torch.storage.TypedStorage,
            torch.uint8,
            where.index,
            *(bytes.fromhex(memory), total, offset, grad),
            *(bytes.fromhex(counter), place, bytes.fromhex(event), wait),
        )
        return list(whole.split(size))
