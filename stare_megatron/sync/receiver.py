"""A worker's end of sharded pushes, whatever it does with what comes. Torch only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stare_megatron.models.boxes import Box
from stare_megatron.sync.link import Inbox, Link
from stare_megatron.sync.place import Carrier, place
from stare_megatron.sync.sharded import told_place
from stare_megatron.sync.slots import Slots

Take = Callable[[int, Box, torch.Tensor], None]
"""`take(need, box, value)`: `value` is of `box`, a part of the need of that number; good until it returns."""


@dataclass(frozen=True)
class _Message:
    """What comes: parts (number of the need, box) one after the other."""

    tag: int
    sender: int
    bytes: int
    parts: tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class Receiver:
    """`carriers`: of each trainer rank that sends to this worker; `mapped`: memory of the host that it shares with some
    of them. `dtype`: on the wire; `where`: the device of the weights."""

    link: Link
    messages: tuple[_Message, ...]
    carriers: dict[int, Carrier]
    mapped: dict[int, list[torch.Tensor]]
    dtype: torch.dtype
    where: torch.device

    @classmethod
    def join(
        cls,
        link: Link,
        worker: int,
        needs: Sequence[Box],
        whole: Sequence[str],
        dtype: torch.dtype,
        where: torch.device,
    ) -> Receiver:
        """Tell what is needed, `whole` being the names of tensors that cannot be cut, and hear what will come."""
        boxes = [[box.name, box.begin, box.end] for box in needs]
        link.tell(f"worker {worker}", {"place": told_place(place(where)), "boxes": boxes, "whole": list(whole)})
        told = link.ask(f"take {worker}")
        messages = tuple(
            _Message(tag, sender, size, tuple((n, Box(needs[n].name, tuple(b), tuple(e))) for _, n, b, e in parts))
            for tag, sender, size, parts in told["messages"]
        )
        carriers = {rank: Carrier[name] for rank, name, _ in told["senders"]}
        mapped = {r: Slots.at(address) for r, _, address in told["senders"] if carriers[r] is Carrier.MAPPED}
        link.meet_by_nccl(sorted(r for r, found in carriers.items() if found is Carrier.NCCL), where)
        return cls(link, messages, carriers, mapped, dtype, where)

    def receive(self, take: Take) -> None:
        """One push.

        Raises:
            RuntimeError: a rank gave up.
        """
        coming = [(m.tag, m.sender, m.bytes) for m in self.messages]
        inbox = Inbox(self.link, coming, self.carriers, self.mapped, self.where)
        with contextlib.ExitStack() as after_an_error:
            after_an_error.callback(inbox.forget)
            self._read(inbox, take)
            after_an_error.pop_all()
        inbox.close()

    def _read(self, inbox: Inbox, take: Take) -> None:
        """Returns when nothing looks into the senders' memory any more."""
        for message, got in zip(self.messages, inbox, strict=True):
            values, at = got.view(self.dtype), 0
            for need, box in message.parts:
                take(need, box, values[at : at + box.elements].view(box.shape))
                at += box.elements
