"""Who sends what to whom in a sharded push: the intersection of what ranks hold and what engine workers need.

Found once for an engine. Pure: no torch, no vLLM.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stare_megatron.errors import RunError
from stare_megatron.models.boxes import Box
from stare_megatron.sync.place import Place

BUCKET_BYTES = 8 << 20
"""Most bytes of a message, but between GPUs (`models.layout`); a row that has more gets a message of its own."""


@dataclass(frozen=True)
class Piece:
    """`box`, of what sender holds as its number `held` and worker needs as its number `need`."""

    held: int
    need: int
    box: Box


@dataclass(frozen=True)
class Message:
    """Pieces that trainer rank `sender` packs one after the other, in the wire's dtype, for worker `worker` of the
    engine."""

    sender: int
    worker: int
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        return sum(piece.box.elements for piece in self.pieces)


@dataclass(frozen=True)
class Party:
    """A trainer rank or a worker: where it is, and the boxes it holds or needs, in its own order."""

    place: Place
    boxes: tuple[Box, ...]


def plan(
    senders: Sequence[Party], workers: Sequence[Party], itemsize: int, bucket: int = BUCKET_BYTES
) -> list[Message]:
    """Messages in the order in which every party takes its own, so that none waits for one that waits for it.

    Every element of every need is in exactly one message. Of several ranks that hold the same box one sends it: one on
    the worker's GPU before others, then one on its machine, and of those the one with the least to send so far, so that
    data-parallel replicas share the work. `itemsize`: bytes of an element on the wire.

    Raises:
        RunError: a need that is not held, or held in part or twice over; names worker and box.
    """
    holders = _by_name(senders)
    loads = [0] * len(senders)
    by_worker = [
        list(_messages(w, _pieces(w, party, senders, holders, loads), max(1, bucket // itemsize)))
        for w, party in enumerate(workers)
    ]
    # By turns, so that senders serve all workers at once.
    turns = itertools.zip_longest(*by_worker)
    return [message for turn in turns for message in turn if message is not None]


def require_taken(shapes: Mapping[str, Sequence[int]], workers: Iterable[Party]) -> None:
    """The workers of an engine must take all of every tensor together, such as each expert of a mixture somewhere.

    Raises:
        RunError: they do not; names the tensor.
    """
    taken: dict[str, int] = collections.Counter()
    for box in {box for party in workers for box in party.boxes}:
        taken[box.name] += box.elements
    for name, shape in shapes.items():
        if taken[name] < math.prod(shape):
            raise RunError(
                f"weight push: the engine's workers take {taken[name]} of the {math.prod(shape)} elements of {name}"
            )


def _by_name(senders: Sequence[Party]) -> dict[str, dict[Box, list[tuple[int, int]]]]:
    """Name -> box -> (rank, its number there) of everyone who holds it."""
    found: dict[str, dict[Box, list[tuple[int, int]]]] = collections.defaultdict(dict)
    for rank, party in enumerate(senders):
        for number, box in enumerate(party.boxes):
            found[box.name].setdefault(box, []).append((rank, number))
    for boxes in found.values():
        for one, other in itertools.combinations(boxes, 2):
            if one.intersection(other):
                raise RunError(f"weight push: trainer ranks hold {one} and {other}, which overlap")
    return found


def _pieces(
    worker: int,
    party: Party,
    senders: Sequence[Party],
    holders: dict[str, dict[Box, list[tuple[int, int]]]],
    loads: list[int],
) -> Iterator[tuple[int, Piece]]:
    """(sender, piece) of everything a worker needs."""
    for number, need in enumerate(party.boxes):
        found = 0
        for box, who in holders.get(need.name, {}).items():
            shared = box.intersection(need)
            if shared is None:
                continue
            rank, held = min(who, key=lambda pair: (senders[pair[0]].place.distance(party.place), loads[pair[0]]))
            loads[rank] += shared.elements
            found += shared.elements
            yield rank, Piece(held, number, shared)
        if found != need.elements:
            raise RunError(
                f"weight push: worker {worker} needs {need}, of which the trainer ranks hold {found} of "
                f"{need.elements} elements"
            )


def _messages(worker: int, pieces: Iterator[tuple[int, Piece]], most: int) -> Iterator[Message]:
    """Pieces packed into messages. What all senders have under way for a worker is at most one bucket, so that a
    module whose parts come from several of them is complete as soon as may be."""
    waiting: dict[int, list[Piece]] = {}
    size = 0
    for sender, whole in pieces:
        for box in whole.box.rows(most):
            if size and size + box.elements > most:
                yield from (Message(rank, worker, tuple(parts)) for rank, parts in waiting.items())
                waiting, size = {}, 0
            waiting.setdefault(sender, []).append(Piece(whole.held, whole.need, box))
            size += box.elements
    yield from (Message(rank, worker, tuple(parts)) for rank, parts in waiting.items())
