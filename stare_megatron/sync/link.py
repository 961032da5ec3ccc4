"""The connections of one engine with the trainer ranks for sharded pushes, and what travels over them. Torch only.

All are in one gloo group. Between CPUs of different machines it carries the messages. Elsewhere it carries words of a
few bytes, which also say when somebody has given up: the sender packs a message into memory that both have, of the host
or of the GPU, or hands it to NCCL.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, ProcessGroupGloo, Store

from stare_megatron.errors import RunError
from stare_megatron.host import copies
from stare_megatron.sync import wire
from stare_megatron.sync.place import Carrier
from stare_megatron.sync.slots import SLOTS, GpuSlots, Slots

_HELLO = 1 << 30
"""Tag of what a sender tells a receiver about its GPU's buffers, and of the answer that they are no longer used."""
_HELLO_BYTES = 4096


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
        self._nccl: Any = None

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

    def meet_by_nccl(self, others: Sequence[int], where: torch.device) -> None:
        """Make the communicators with `others`, in their order, for which both sides wait: not in a push, where one
        might have failed. Ranks and workers that all go through their pairs by (rank, worker) cannot block each other.
        """
        for other in others:
            word = torch.zeros(1, dtype=torch.uint8, device=where)
            if self.rank < other:
                self.send_gpu(word, other, 0).wait()
            else:
                self.receive_gpu(word, other, 0)
            word.item()  # waits for the device

    def send_gpu(self, tensor: torch.Tensor, rank: int, tag: int) -> Any:
        """By NCCL, after what is queued on the current stream. Of a pair both must call in the same order."""
        return self._gpu_group().send([tensor], rank, tag)

    def receive_gpu(self, tensor: torch.Tensor, rank: int, tag: int) -> None:
        """What is queued on the current stream from now on finds it there."""
        self._gpu_group().recv([tensor], rank, tag).wait()

    def close(self) -> None:
        self._group = None
        if self._nccl is not None:
            self._nccl.abort()  # a peer that is gone would keep its kernels, and us, waiting
            self._nccl = None

    def _gpu_group(self) -> Any:
        """torch makes communicators of two for point-to-point messages, so that ranks and workers that share a GPU,
        which NCCL takes for an error, may both be in the group."""
        self._open()
        if self._nccl is None:
            self._nccl = nccl_group(PrefixStore("nccl", self._store), self.rank, self.senders + self.workers)
        return self._nccl

    def _open(self) -> ProcessGroup:
        if self._group is None:
            raise RuntimeError(f"{self.name}: the connections for weights were closed after an error")
        return self._group


def nccl_group(store: Store, rank: int, size: int) -> Any:
    """As vLLM makes its own (`stateless_init_device_torch_dist_pg` of vllm/platforms/cuda.py)."""
    from torch.distributed.distributed_c10d import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = wire.TIMEOUT
    group = ProcessGroupNCCL(store, rank, size, options)
    group._set_sequence_number_for_group()
    return group


@dataclass(frozen=True)
class _UnderWay:
    """A message to `receiver`: what to wait for, and what must live until then."""

    receiver: str
    works: tuple[Any, ...]
    memory: tuple[torch.Tensor, ...]

    def wait(self) -> None:
        with _naming(self.receiver):
            for work in self.works:
                work.wait()


@contextmanager
def _naming(receiver: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        raise RunError(f"{receiver} ended, or gave a push of weights up: {str(e).splitlines()[0]}") from e


class Outbox:
    """A trainer rank's messages on their way, to the workers of all engines, at most `SLOTS` at a time.

    `where`: the rank's device. On a GPU there are buffers for as long as a push takes; in host memory they stay.
    """

    def __init__(self, size: int, where: torch.device, *, on_gpu: bool) -> None:
        self._size = size
        self._where = where
        self._mapped = None if on_gpu else Slots(size)
        self._slots: list[torch.Tensor] = self._mapped.tensors if self._mapped else []
        self._under_way: list[_UnderWay | None] = [None] * SLOTS
        self._greeted: list[_UnderWay] = []
        self._next = 0

    @property
    def address(self) -> tuple[int, int, int] | None:
        return self._mapped.address if self._mapped else None

    def open(self, near: Collection[tuple[Link, int]]) -> None:
        """Before the first message of a push. `near`: workers, with their links, that read this rank's GPU's memory."""
        if self._mapped is None:
            slots = GpuSlots(self._size, self._where)
            self._slots = slots.tensors
            for link, worker in near:
                self._greet(link, worker, slots.handle())

    def _greet(self, link: Link, worker: int, handle: list[Any]) -> None:
        rank, receiver = link.senders + worker, _receiver(link, worker)
        hello = torch.frombuffer(bytearray(json.dumps(handle).encode().ljust(_HELLO_BYTES)), dtype=torch.uint8)
        goodbye = torch.empty(1, dtype=torch.int64)
        with _naming(receiver):
            works = link.send(hello, rank, _HELLO), link.receive(goodbye, rank, _HELLO)
        self._greeted.append(_UnderWay(receiver, works, (hello, goodbye)))

    def buffer(self) -> torch.Tensor:
        """Memory for the next message, uint8; waits until its receiver has read what was in it.

        Raises:
            RunError: it has closed its end, or is gone; names it.
        """
        under_way, self._under_way[self._next] = self._under_way[self._next], None
        if under_way is not None:
            under_way.wait()
        return self._slots[self._next]

    def send(self, link: Link, worker: int, tag: int, size: int, carrier: Carrier) -> None:
        """Send the first `size` bytes of what `buffer` gave.

        Raises:
            RunError: as `buffer`.
        """
        rank, receiver, message = link.senders + worker, _receiver(link, worker), self._slots[self._next][:size]
        with _naming(receiver):
            if carrier is Carrier.GLOO:
                works, memory = (link.send(message, rank, tag),), ()
            else:
                if carrier is Carrier.IPC:
                    copies.finish()  # another process looks at what was packed, on a stream of its own
                word, answer = torch.tensor([self._next]), torch.empty(1, dtype=torch.int64)
                works, memory = (link.send(word, rank, tag), link.receive(answer, rank, tag)), (word, answer)
                if carrier is Carrier.NCCL:  # after the word, which says that we are waiting
                    works = (*works, link.send_gpu(message, rank, tag))
        self._under_way[self._next] = _UnderWay(receiver, works, memory)
        self._next = (self._next + 1) % SLOTS

    def finish(self) -> None:
        """Wait until everything is read, and give the GPU's buffers back."""
        for _ in range(SLOTS):
            self.buffer()
            self._next = (self._next + 1) % SLOTS
        greeted, self._greeted = self._greeted, []
        for under_way in greeted:
            under_way.wait()
        self._give_back()

    def forget(self) -> None:
        """After an error: what is under way will not arrive."""
        self._under_way = [None] * SLOTS
        self._greeted = []
        self._give_back()

    def _give_back(self) -> None:
        if self._mapped is None:
            self._slots = []
            copies.collect_shared()


def _receiver(link: Link, worker: int) -> str:
    return f"{link.name} (worker {worker})"


class Inbox:
    """A worker's messages of one push, as they come.

    Args:
        messages: (tag, sender, bytes) of each, in order.
        carriers: of each sender.
        mapped: the slots of those whose memory of the host is mapped.
        where: the worker's device.
    """

    def __init__(
        self,
        link: Link,
        messages: Sequence[tuple[int, int, int]],
        carriers: Mapping[int, Carrier],
        mapped: Mapping[int, list[torch.Tensor]],
        where: torch.device,
    ) -> None:
        self._link = link
        self._messages = messages
        self._carriers = carriers
        self._slots = dict(mapped)
        self._near = sorted({s for _, s, _ in messages if carriers[s] is Carrier.IPC})
        self._where = where
        self._waiting: list[tuple[Any, torch.Tensor]] = []
        self._own = [bytearray(0)] * SLOTS

    def __iter__(self) -> Generator[torch.Tensor]:
        """uint8 tensors, good until the next is asked for. Of senders behind gloo `SLOTS` are received at a time."""
        for sender in self._near:
            hello = torch.empty(_HELLO_BYTES, dtype=torch.uint8)
            self._link.receive(hello, sender, _HELLO).wait()
            self._slots[sender] = GpuSlots.at(json.loads(bytes(hello.numpy())), self._where)
        sizes = [size for _, sender, size in self._messages if self._carriers[sender] is Carrier.NCCL]
        own_B = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=self._where)
        for number in range(min(SLOTS, len(self._messages))):
            self._post(number)
        for number, (tag, sender, size) in enumerate(self._messages):
            work, got = self._waiting.pop(0)
            work.wait()
            del work  # in the frames of an error it would keep the connections open
            carrier = self._carriers[sender]
            if carrier is Carrier.NCCL:
                self._link.receive_gpu(own_B[:size], sender, tag)
                yield own_B[:size]
            else:
                yield self._slots[sender][int(got)][:size] if carrier.in_place else got
            if carrier is not Carrier.GLOO:
                copies.finish()  # the sender may overwrite it as soon as we answer
                self._link.send(got, sender, tag).wait()
            if number + SLOTS < len(self._messages):
                self._post(number + SLOTS)

    def _post(self, number: int) -> None:
        tag, sender, size = self._messages[number]
        if self._carriers[sender] is Carrier.GLOO:
            if len(self._own[number % SLOTS]) < size:
                self._own[number % SLOTS] = bytearray(size)
            into = torch.frombuffer(self._own[number % SLOTS], dtype=torch.uint8)[:size]
        else:
            into = torch.empty(1, dtype=torch.int64)
        self._waiting.append((self._link.receive(into, sender, tag), into))

    def forget(self) -> None:
        """After an error: what is waited for keeps connections open, at whose end the senders hear of it."""
        self._waiting.clear()

    def close(self) -> None:
        """Let go of the senders' GPU's memory, and tell them. Nobody may hold what was yielded any more."""
        self._slots.clear()
        for sender in self._near:
            self._link.send(torch.zeros(1, dtype=torch.int64), sender, _HELLO).wait()
