"""What a push between GPUs asks of CUDA and NCCL, stood in for on a CPU; everything else is the code that runs there.

Memory that was shared is seen by others as it was when the owner last waited for its stream, as work on a GPU is done
only then. NCCL's messages have no tags, and the first between two parties makes both wait.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store
from torch.multiprocessing import reductions
from torch.multiprocessing.reductions import StorageWeakRef

from stare_megatron.host import copies
from stare_megatron.sync import link, wire


class Gpu:
    """As one process sees it. `reduce` gives what `reduce_tensor` does for a CUDA tensor, its fields as torch 2.13
    makes them, and `rebuild` is its inverse."""

    def __init__(self) -> None:
        self._shared: list[tuple[StorageWeakRef, int, torch.Tensor]] = []
        self._opened: list[StorageWeakRef] = []

    @property
    def in_use(self) -> int:
        """Buffers that were shared and are still kept, and those of others that are still mapped."""
        kept = [owner for owner, _, _ in self._shared] + self._opened
        return sum(not ref.expired() for ref in kept)

    def install(self, put: Callable[[Any, str, Any], None]) -> None:
        """`put`: setattr, such as can be undone."""
        put(reductions, "reduce_tensor", self.reduce)
        put(reductions, "rebuild_cuda_tensor", self.rebuild)
        put(copies, "finish", self.finish)
        put(link, "nccl_group", Nccl)

    def reduce(self, tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        file = os.memfd_create("gpu")
        os.truncate(file, tensor.nbytes)
        seen = torch.frombuffer(mmap.mmap(file, tensor.nbytes), dtype=torch.uint8)
        self._shared.append((StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr(), seen))
        handle = b"%d/%d" % (os.getpid(), file)
        where = (3, handle, tensor.nbytes, 0, tensor.requires_grad, b"c\x00\xff", 3, b"", False)
        types = type(tensor._typed_storage()), tensor.dtype
        return None, (type(tensor), tensor.size(), tensor.stride(), tensor.storage_offset(), *types, *where)

    def rebuild(self, cls: Any, size: Any, stride: Any, offset: int, storage: Any, dtype: Any, *where: Any) -> Any:
        assert (cls, stride, offset, storage) == (torch.Tensor, (1,), 0, torch.storage.TypedStorage)
        assert (dtype, where[0], where[4:]) == (torch.uint8, None, (False, b"c\x00\xff", 3, b"", False))
        assert size == (where[2],)
        pid, number = where[1].decode().split("/")
        file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        found = torch.frombuffer(mmap.mmap(file, where[2]), dtype=dtype)
        os.close(file)
        self._opened.append(StorageWeakRef(found.untyped_storage()))
        return found

    def finish(self) -> None:
        for owner, begin, seen in self._shared:
            if not owner.expired():
                ctypes.memmove(seen.data_ptr(), begin, seen.nbytes)


class Nccl:
    """A group for each pair, made when both first want it."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._pairs: dict[int, Any] = {}

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Any:
        return self._pair(rank).send([tensors[0].clone()], int(self._rank < rank), 0)

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Any:
        return self._pair(rank).recv(tensors, int(self._rank < rank), 0)

    def abort(self) -> None:
        self._pairs.clear()

    def _pair(self, other: int) -> Any:
        if other not in self._pairs:
            low, high = sorted((self._rank, other))
            store = PrefixStore(f"{low} and {high}", self._store)
            self._pairs[other] = ProcessGroupGloo(store, int(self._rank > other), 2, wire.TIMEOUT)
        return self._pairs[other]
