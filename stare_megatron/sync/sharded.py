"""Sharded pushes: each trainer rank sends each engine worker exactly the boxes it needs. The trainer's side.

    rank: its boxes  --tell-->  rank 0: plan  --tell-->  rank: what to send, worker: what comes
    worker: its needs --tell-->

That is once for an engine; a push then follows the plan. Nothing is gathered.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore

from stare_megatron.models.boxes import Box
from stare_megatron.models.layout import GPU_PUSH_BUCKET
from stare_megatron.sync.check import box_sum
from stare_megatron.sync.fanout import EngineFanOut
from stare_megatron.sync.link import Link, Outbox
from stare_megatron.sync.place import Carrier, Place, carrier, place
from stare_megatron.sync.plan import BUCKET_BYTES, Message, Party, plan, require_taken
from stare_megatron.sync.source import ParamSpec

Holdings = Callable[[], Iterator[tuple[Box, torch.Tensor]]]
"""A rank's boxes and views of its parameters, in the same order each time."""

_CAUSE_S = 10.0  # an engine that closes its end tells why a little later


@dataclass(frozen=True)
class _Part:
    """`box` of the rank's holding number `held`, packed at byte `begin`; `label` names the need it is for."""

    held: int
    box: Box
    begin: int
    label: str


@dataclass(frozen=True)
class _Order:
    """A message of this rank: message `tag` of the engine's plan."""

    tag: int
    worker: int
    bytes: int
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Engine:
    """An engine that has joined. `carriers`: what carries this rank's messages to each of its workers."""

    client: EngineFanOut
    link: Link
    orders: tuple[_Order, ...]
    carriers: tuple[Carrier, ...]

    @property
    def near(self) -> list[tuple[Link, int]]:
        """Workers that read what this rank sends them from the GPU that both use."""
        workers = sorted({order.worker for order in self.orders})
        return [(self.link, w) for w in workers if self.carriers[w] is Carrier.IPC]


class ShardedPusher:
    """Pushes the policy into engines. Every trainer rank has one and calls it together with the others.

    Args:
        rank: trainer rank, of `ranks`; only rank 0 calls the engines' clients.
        specs: all of the policy's parameters as they travel, of one dtype.
        holdings: what this rank holds of them.
        store: what rank 0 has opened by `wire.host_store`.
        host: rank 0's address, as engines see it.
    """

    def __init__(
        self, rank: int, ranks: int, specs: Sequence[ParamSpec], holdings: Holdings, store: TCPStore, host: str
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._specs = tuple(specs)
        self._holdings = holdings
        self._store = store
        self._host = host
        (self._dtype,) = {spec.dtype for spec in specs}
        held = list(holdings())
        self._boxes = tuple(box for box, _ in held)
        self._where = held[0][1].device
        self._place = place(self._where)
        self._bucket = GPU_PUSH_BUCKET if self._place.gpu else BUCKET_BYTES
        row = max(box.elements // box.shape[0] for box in self._boxes) * self._dtype.itemsize
        self._outbox = Outbox(max(self._bucket, row), self._where, on_gpu=bool(self._place.gpu))
        self._engines: dict[str, _Engine] = {}
        self._joins: collections.Counter[str] = collections.Counter()

    def connect(self, engines: Mapping[str, EngineFanOut]) -> list[str]:
        """Let engines join, by name; a late one may do so at any time between pushes. Returns what to tell of it: on
        rank 0, what travels whole.

        Raises:
            RunError: an engine did not join, or needs what no rank holds.
        """
        self._joins.update(list(engines))
        pool = ThreadPoolExecutor(1 + len(engines))
        joined: list[Future[Any]] = []
        try:
            if self._rank == 0:
                joined += [
                    pool.submit(client.init_weight_transfer_engine, self._init_info(name, client))
                    for name, client in engines.items()
                ]
            met = pool.submit(self._meet, engines)
            # Both sides wait until all are there: an engine's error must end our waiting, too.
            for done in wait([met, *joined], return_when=FIRST_EXCEPTION).done:
                done.result()
            return met.result()
        finally:
            pool.shutdown(wait=False)

    def push(self, version: int, engines: Collection[str] | None = None) -> int:
        """Send everything that `engines` (None: all that joined) need; when it returns on rank 0 they sample with
        `version`. Returns the bytes this rank sent.

        Raises:
            RunError: an engine failed; names it. Its later pushes need another `connect`.
        """
        chosen = [self._engines[name] for name in (self._engines if engines is None else engines)]
        received: list[Future[Any]] = []
        with contextlib.ExitStack() as stack:
            pool = ThreadPoolExecutor(max(1, len(chosen)))
            stack.callback(pool.shutdown, wait=False)
            stack.push(functools.partial(self._give_up, chosen, received))
            if self._rank == 0:
                list(pool.map(lambda engine: engine.client.start_weight_update(), chosen))
                received += [pool.submit(engine.client.update_weights, {"version": version}) for engine in chosen]
            sent = self._send(chosen)
            for future in received:
                future.result()
            if self._rank == 0:
                list(pool.map(lambda engine: engine.client.finish_weight_update(str(version)), chosen))
            return sent

    def _give_up(
        self, engines: Sequence[_Engine], received: Sequence[Future[Any]], kind: Any, error: Any, trace: Any
    ) -> None:
        """After an error: raises what an engine says of it, if it does."""
        if kind is None:
            return
        for engine in engines:
            engine.link.close()  # its workers must not wait for us
            self._engines.pop(engine.link.name, None)
        self._outbox.forget()  # after NCCL, which may read its buffers, has been told to stop
        if self._rank == 0 and engines:
            # Other ranks wait for workers that live and were never told to receive.
            pool = ThreadPoolExecutor(len(engines))
            for engine in engines:
                pool.submit(engine.client.give_up_weight_update)
            pool.shutdown(wait=False)
        for future in wait(received, _CAUSE_S, FIRST_EXCEPTION).done:
            future.result()

    def sums(self, names: Collection[str], to: str = "") -> dict[str, str]:
        """This rank's shares (`check.added`) of the checksums of what it sends engine `to` (any: engines that are alike
        have the same) of the tensors `names`, by `label`."""
        views = [view for _, view in self._holdings()]
        shapes = {spec.name: spec.shape for spec in self._specs}
        found: dict[str, int] = {}
        engine = self._engines[to] if to else next(iter(self._engines.values()))
        for part in itertools.chain.from_iterable(order.parts for order in engine.orders):
            if part.box.name in names:
                view = views[part.held][part.box.within(self._boxes[part.held])].to(self._dtype)
                found[part.label] = found.get(part.label, 0) + box_sum(view, part.box, shapes[part.box.name])
        return {name: f"{value & (1 << 64) - 1:016x}" for name, value in found.items()}

    def _init_info(self, name: str, client: EngineFanOut) -> dict[str, Any]:
        return {
            "host": self._host,
            "port": self._store.port,
            "name": self._rendezvous(name),
            "senders": self._ranks,
            "workers": client.workers[0],
            "names": [s.name for s in self._specs],
            "dtype_name": str(self._dtype).removeprefix("torch."),
            "shapes": [list(s.shape) for s in self._specs],
        }

    def _rendezvous(self, name: str) -> str:
        """Where an engine meets the ranks: elsewhere each time it joins."""
        return f"{name}, time {self._joins[name]}"

    def _meet(self, engines: Mapping[str, EngineFanOut]) -> list[str]:
        told = []
        for name, client in engines.items():
            link = Link(
                PrefixStore(self._rendezvous(name), self._store), name, self._rank, self._ranks, client.workers[0]
            )
            mine = [[box.name, box.begin, box.end] for box in self._boxes]
            link.tell(
                f"rank {self._rank}", {"place": told_place(self._place), "boxes": mine, "slots": self._outbox.address}
            )
            if self._rank == 0:
                told += self._plan(link)
            workers = [_party(link.ask(f"worker {w}")) for w in range(link.workers)]
            orders = tuple(
                _Order(tag, w, size, tuple(self._parts(w, workers[w], parts)))
                for tag, w, size, parts in link.ask(f"send {self._rank}")
            )
            carriers = tuple(carrier(self._place, party.place) for party in workers)
            far = sorted({order.worker for order in orders if carriers[order.worker] is Carrier.NCCL})
            link.meet_by_nccl([link.senders + w for w in far], self._where)
            self._engines[name] = _Engine(client, link, orders, carriers)
        return told

    def _parts(self, worker: int, party: Party, parts: list[Any]) -> Iterator[_Part]:
        at = 0
        for held, need, begin, end in parts:
            box = Box(party.boxes[need].name, tuple(begin), tuple(end))
            yield _Part(held, box, at, label(party.boxes[need], worker))
            at += box.elements * self._dtype.itemsize

    def _plan(self, link: Link) -> list[str]:
        """Rank 0: make the engine's plan and tell it to everyone."""
        ranks = [link.ask(f"rank {r}") for r in range(link.senders)]
        workers = [link.ask(f"worker {w}") for w in range(link.workers)]
        size = self._dtype.itemsize
        holders, takers = [_party(r) for r in ranks], [_party(w) for w in workers]
        require_taken({spec.name: spec.shape for spec in self._specs}, takers)
        messages = plan(holders, takers, size, self._bucket)
        for r in range(link.senders):
            link.tell(
                f"send {r}",
                [[t, m.worker, m.elements * size, _written(m)] for t, m in enumerate(messages) if m.sender == r],
            )
        for w in range(link.workers):
            mine = [(t, m) for t, m in enumerate(messages) if m.worker == w]
            senders = {m.sender: carrier(holders[m.sender].place, takers[w].place) for _, m in mine}
            link.tell(
                f"take {w}",
                {
                    "messages": [[t, m.sender, m.elements * size, _written(m)] for t, m in mine],
                    "senders": [[r, found.name, ranks[r]["slots"]] for r, found in sorted(senders.items())],
                },
            )
        whole = sorted({name for worker in workers for name in worker["whole"]})
        if not whole:
            return []
        return [f"{link.name} takes {len(whole)} of {len(self._specs)} tensors whole, such as {whole[0]}"]

    @torch.no_grad()
    def _send(self, engines: Sequence[_Engine]) -> int:
        views = [view for _, view in self._holdings()]
        self._outbox.open([receiver for engine in engines for receiver in engine.near])
        sent = 0
        for turn in itertools.zip_longest(*(engine.orders for engine in engines)):
            for engine, order in zip(engines, turn, strict=True):
                if order is None:
                    continue
                buffer = self._outbox.buffer()[: order.bytes].view(self._dtype)
                for part in order.parts:
                    view = views[part.held][part.box.within(self._boxes[part.held])]
                    begin = part.begin // self._dtype.itemsize
                    buffer[begin : begin + part.box.elements].view(part.box.shape).copy_(view)
                self._outbox.send(engine.link, order.worker, order.tag, order.bytes, engine.carriers[order.worker])
                sent += order.bytes
        self._outbox.finish()
        return sent


def label(need: Box, worker: int) -> str:
    """How errors name what a worker has of a tensor."""
    return f"{need} of worker {worker}"


def told_place(found: Place) -> list[str]:
    """As parties tell each other."""
    return [found.machine, found.gpu]


def _party(told: Mapping[str, Any]) -> Party:
    return Party(
        Place(*told["place"]), tuple(Box(name, tuple(begin), tuple(end)) for name, begin, end in told["boxes"])
    )


def _written(message: Message) -> list[Any]:
    return [[p.held, p.need, p.box.begin, p.box.end] for p in message.pieces]
