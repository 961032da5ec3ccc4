"""Tensors over a gloo group of their own: packed into bounded buffers, broadcast from rank 0. Torch only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroup, ProcessGroupGloo, TCPStore

from stare_megatron.models.hf_folder import grouped, spec_bytes
from stare_megatron.sync.source import ParamSpec

BUFFER_BYTES = 64 << 20
"""Buffer size; a larger parameter gets a buffer of its own size."""

TIMEOUT = timedelta(minutes=10)
"""How long a side waits for the other at the store and in a broadcast."""

JOIN_TIMEOUT = timedelta(minutes=2)
"""How long parties wait for one that dies while a group is formed. Nobody computes meanwhile."""


class GlooGroup:
    """A gloo group outside torch.distributed's global state. Rank 0 is the sender and hosts the store."""

    def __init__(self, store: TCPStore, rank: int, world_size: int) -> None:
        self._store = store
        self._group: ProcessGroup | None = ProcessGroupGloo(
            PrefixStore("weights", store), rank, world_size, JOIN_TIMEOUT
        )  # type: ignore[assignment]

    @classmethod
    def join(cls, host: str, port: int, rank: int, world_size: int) -> GlooGroup:
        return cls(join_store(host, port), rank, world_size)

    def broadcast(self, buffer: torch.Tensor, failed: Callable[[], None]) -> None:
        """Broadcast uint8 `buffer` from rank 0. `failed` is called while waiting and raises if the peer gave up."""
        if self._group is None:
            raise RuntimeError("the weight transport was closed after an error")
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = TIMEOUT
        work = self._group.broadcast([buffer], options)
        while not work.is_completed():
            failed()
            time.sleep(2e-4)
        work.wait()

    def close(self) -> None:
        """Close the connections: whoever waits for us in a broadcast gets an error at once."""
        self._group = None


def host_store(host: str) -> TCPStore:
    """The rendezvous store, on a port the system chooses (`.port`)."""
    return TCPStore(host, 0, None, True, TIMEOUT, wait_for_workers=False)


def join_store(host: str, port: int) -> TCPStore:
    """The store that another process hosts."""
    return TCPStore(host, port, None, False, TIMEOUT)


def send(
    group: GlooGroup,
    specs: tuple[ParamSpec, ...],
    tensors: Iterator[tuple[str, torch.Tensor]],
    limit: int,
    failed: Callable[[], None],
) -> None:
    """Send `tensors`, which agree with `specs`, through one buffer."""
    runs = grouped(specs, spec_bytes, limit)
    buffer = torch.empty(max(sum(map(spec_bytes, run)) for run in runs), dtype=torch.uint8)
    for run in runs:
        end = 0
        for spec, (_, tensor) in zip(run, tensors, strict=False):
            begin, end = end, end + spec_bytes(spec)
            buffer[begin:end].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        group.broadcast(buffer[:end], failed)
    for _ in tensors:  # exhausts the iterator, so that a surplus is an error and collectives end together
        pass


def receive(group: GlooGroup, specs: Iterable[ParamSpec], limit: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the parameters bucket by bucket: both sides cut the stream at the same places.

    Each bucket has fresh memory: vLLM's layerwise reload keeps references to tensors until their layer is complete.
    """
    for run in grouped(specs, spec_bytes, limit):
        buffer = torch.empty(sum(map(spec_bytes, run)), dtype=torch.uint8)
        group.broadcast(buffer, lambda: None)
        pieces = buffer.split([spec_bytes(spec) for spec in run])
        yield [(s.name, p.view(s.dtype).view(s.shape)) for s, p in zip(run, pieces, strict=True)]
