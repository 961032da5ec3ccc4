"""What an engine is asked for: a group, some samples of it, or to put together what several engines sampled of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import ray

from stare_megatron.types import Group, GroupRequest, GroupSummary


@dataclass
class Spread:
    """A group that several engines sample. `parts`: how many; `done`: those that are there, by their first samples."""

    parts: int
    done: dict[int, tuple[ray.ObjectRef, GroupSummary]] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """`samples` of a group; of one that is spread, none where its parts are to be joined."""

    request: GroupRequest
    samples: tuple[int, ...]
    spread: Spread | None = None

    @property
    def joins(self) -> bool:
        return not self.samples


def whole(request: GroupRequest) -> Order:
    return Order(request, tuple(range(request.group_size)))


def spread(order: Order, engines: int) -> list[Order]:
    """The same group for so many engines, in parts that differ by a sample at most; those it has no sample for get
    none."""
    size = len(order.samples)
    parts = min(engines, size)
    together = Spread(parts)
    cuts = [size - size * (parts - i) // parts for i in range(parts + 1)]  # larger ones first
    return [Order(order.request, order.samples[begin:end], together) for begin, end in itertools.pairwise(cuts)]


def joined(reflections: tuple[int, ...], parts: tuple[Group, ...]) -> tuple[Group, GroupSummary]:
    """One group of its parts, in the order of their samples, as if one engine had sampled it."""
    trajectories = tuple(t for part in parts for t in part.trajectories)
    group = Group(parts[0].prompt, trajectories, tuple(s for part in parts for s in part.scores))
    return group, group.summary(reflections)
