"""The connections of one engine with the trainer ranks for sharded pushes, and what travels over them. Torch only.

All are in one gloo group. Between processes of one machine it carries words of a few bytes: the sender packs a message
into memory that both have mapped. Between machines it carries the messages.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, ProcessGroupGloo, Store

from stare_megatron.errors import RunError
from stare_megatron.sync import wire

SLOTS = 2
"""Messages a sender may have under way."""


def machine() -> str:
    """Same for processes that can map each other's memory: of one machine, user and process namespace."""
    parts = [platform.node(), str(os.getuid())]
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        path = Path(file)
        parts.append(os.readlink(path) if path.is_symlink() else path.read_text().strip())
    return "/".join(parts)


class Slots:
    """A sender's buffers, in memory that others can map: `tensors` are uint8 [bytes]."""

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


class Link:
    """A party's end. Trainer ranks come first in the group, then the engine's workers.

    `store`: of this link alone. `name`: of the engine. A party that fails closes its end, and whoever waits for it gets
    an error.
    """

    def __init__(self, store: Store, name: str, rank: int, senders: int, workers: int) -> None:
        self.name = name
        self.rank = rank
        self.senders = senders
        self.workers = workers
        self._store = store
        self._group: ProcessGroup | None = ProcessGroupGloo(
            PrefixStore("group", self._store), rank, senders + workers, wire.TIMEOUT
        )  # type: ignore[assignment]

    def tell(self, key: str, value: Any) -> None:
        """Leave `value`, of what JSON can hold, for other parties."""
        self._store.set(key, json.dumps(value, separators=(",", ":")))

    def ask(self, key: str) -> Any:
        """What some party tells under `key`; waits for it."""
        return json.loads(self._store.get(key))

    def send(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        return self._open().send([tensor], rank, tag)

    def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        return self._open().recv([tensor], rank, tag)

    def close(self) -> None:
        self._group = None

    def _open(self) -> ProcessGroup:
        if self._group is None:
            raise RuntimeError(f"{self.name}: the connections for weights were closed after an error")
        return self._group


@dataclass(frozen=True)
class _UnderWay:
    """A message to `receiver`: what to wait for, and what must live until then."""

    receiver: str
    works: tuple[Any, ...]
    memory: tuple[torch.Tensor, ...]


@contextmanager
def _naming(receiver: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        raise RunError(f"{receiver} ended, or gave a push of weights up: {str(e).splitlines()[0]}") from e


class Outbox:
    """A trainer rank's messages on their way, to the workers of all engines, at most `SLOTS` at a time."""

    def __init__(self, size: int) -> None:
        self._slots = Slots(size)
        self._under_way: list[_UnderWay | None] = [None] * SLOTS
        self._next = 0

    @property
    def address(self) -> tuple[int, int, int]:
        return self._slots.address

    def buffer(self) -> torch.Tensor:
        """Memory for the next message, uint8; waits until its receiver has read what was in it.

        Raises:
            RunError: it has closed its end, or is gone; names it.
        """
        under_way, self._under_way[self._next] = self._under_way[self._next], None
        if under_way is not None:
            with _naming(under_way.receiver):
                for work in under_way.works:
                    work.wait()
        return self._slots.tensors[self._next]

    def send(self, link: Link, worker: int, tag: int, size: int, *, mapped: bool) -> None:
        """Send the first `size` bytes of what `buffer` gave. `mapped`: the worker has it mapped.

        Raises:
            RunError: as `buffer`.
        """
        rank, receiver = link.senders + worker, f"{link.name} (worker {worker})"
        with _naming(receiver):
            if mapped:
                word, answer = torch.tensor([self._next]), torch.empty(1, dtype=torch.int64)
                works, memory = (link.send(word, rank, tag), link.receive(answer, rank, tag)), (word, answer)
            else:
                works, memory = (link.send(self._slots.tensors[self._next][:size], rank, tag),), ()
        self._under_way[self._next] = _UnderWay(receiver, works, memory)
        self._next = (self._next + 1) % SLOTS

    def finish(self) -> None:
        """Wait until everything is read."""
        for _ in range(SLOTS):
            self.buffer()
            self._next = (self._next + 1) % SLOTS

    def forget(self) -> None:
        """After an error: what is under way will not arrive."""
        self._under_way = [None] * SLOTS


def inbox(
    link: Link, messages: Sequence[tuple[int, int, int]], mapped: dict[int, list[torch.Tensor]]
) -> Iterator[torch.Tensor]:
    """A worker's messages, (tag, sender, bytes) each, in order: uint8 tensors, good until the next is asked for.

    `mapped`: the slots of senders on this machine. Of others `SLOTS` messages are received at a time.
    """
    own = [bytearray(0)] * SLOTS
    waiting: list[tuple[Any, torch.Tensor]] = []

    def post(number: int) -> None:
        tag, sender, size = messages[number]
        if sender in mapped:
            into = torch.empty(1, dtype=torch.int64)
        else:
            if len(own[number % SLOTS]) < size:
                own[number % SLOTS] = bytearray(size)
            into = torch.frombuffer(own[number % SLOTS], dtype=torch.uint8)[:size]
        waiting.append((link.receive(into, sender, tag), into))

    for number in range(min(SLOTS, len(messages))):
        post(number)
    for number, (tag, sender, size) in enumerate(messages):
        work, got = waiting.pop(0)
        work.wait()
        yield mapped[sender][int(got)][:size] if sender in mapped else got
        if sender in mapped:
            link.send(got, sender, tag).wait()
        if number + SLOTS < len(messages):
            post(number + SLOTS)
