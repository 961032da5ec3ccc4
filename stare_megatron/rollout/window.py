"""Which groups may be sampled and which are learned from next, when engines and trainer work at once.

A windowed first-in-first-out queue (MiniMax, arXiv 2605.26494, sec. 6.2.4; in torchtitan's RL experiments), with a
bound on staleness that holds for every group:

* A group is admitted while fewer than (S + 1) batches, or a smaller number of groups, are outstanding: admitted and not
  learned from.
* One that was admitted when engines held version v is due: it must be in the batch of version v + S at the latest.
* A batch takes finished groups, the oldest first, from a window that begins at the oldest outstanding one and is not
  moved by what is taken out of its middle; never one whose place another is going to need to be in time.
* Where none may be taken the trainer waits. Nothing is dropped, so that long groups are learned from as often as
  they are sampled.

By induction every group can be in time: with r free places in the batch of version b and k >= b, at most
r + (k - b) P outstanding groups are due by k. Admission adds only to k >= v + S, where (S + 1) P bounds them all.

Pure: neither Ray nor a clock. Every group has a number, in the order of admission.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """An admitted group: its number, the engines' version then, and how many were admitted under that before it."""

    number: int
    version: int
    order: int


@dataclass(frozen=True)
class Batch:
    """Numbers, each in order: `groups` to learn from; `finished`: since the batch before, dropped ones included;
    `dropped`: of those, the ones that nobody learns from."""

    groups: tuple[int, ...]
    finished: tuple[int, ...]
    dropped: tuple[int, ...]


class Window:
    """Args:
    batch: P, groups in a batch.
    staleness: S, updates between the version that a group was begun with and the one that learns from it, at most.
    outstanding: groups that are admitted and not learned from, at most: from P to (S + 1) P.
    window: groups that may be taken out of turn are less than so many numbers after the oldest outstanding one.
    refills: groups of a batch that may be dropped and replaced; further ones count as finished, to fill the batch.
    end: version that the last batch makes; nothing is admitted for batches after it.
    """

    def __init__(self, batch: int, staleness: int, outstanding: int, window: int, refills: int, end: int) -> None:
        if not batch <= outstanding <= (staleness + 1) * batch:
            raise ValueError(f"{outstanding} outstanding groups, batches of {batch}, {staleness} updates")
        self._size = batch
        self._staleness = staleness
        self._outstanding = outstanding
        self._window = window
        self._refills = refills
        self._end = end
        self._version = 0
        self._number = self._order = 0
        self._running: dict[int, int] = {}  # number -> version it is due in
        self._ready: dict[int, int] = {}
        self._taken: list[int] = []  # for the batch that is being made
        self._learning: tuple[int, ...] = ()
        self._finished: list[int] = []
        self._rejected: list[int] = []
        self._replaced = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def staleness(self) -> int:
        return self._staleness

    @property
    def running(self) -> int:
        """Groups that are admitted and not finished."""
        return len(self._running)

    @property
    def ready(self) -> int:
        """Groups that are finished and in no batch."""
        return len(self._ready)

    @property
    def ahead(self) -> tuple[int, ...]:
        """Numbers of groups that are admitted and in no batch yet."""
        return tuple(sorted([*self._running, *self._ready, *self._taken]))

    def begin(self, version: int) -> None:
        """Engines hold `version`, so the batch handed out before is learned from."""
        self._version, self._order = version, 0
        self._learning = ()

    def admit(self) -> Place | None:
        """The next group, if there is room for one."""
        taken = len(self._running) + len(self._ready) + len(self._taken) + len(self._learning)
        if taken >= min(self._outstanding, (self._end - self._version) * self._size):
            return None
        place = Place(self._number, self._version, self._order)
        self._running[place.number] = self._version + self._staleness
        self._number, self._order = self._number + 1, self._order + 1
        return place

    def hasten(self, number: int, since: int) -> bool:
        """Make a running group due as if it had been admitted under version `since`; False where it is too old for
        that, or not every group could be in time then."""
        due = since + self._staleness
        if due < self._version:
            return False
        others = [*self._ready.values(), *(d for n, d in self._running.items() if n != number)]
        free = self._size - len(self._taken)
        for version in range(due, self._version + self._staleness):
            if sum(d <= version for d in others) >= free + (version - self._version) * self._size:
                return False
        self._running[number] = due
        return True

    def finish(self, number: int, *, useful: bool) -> None:
        """A running group is finished. One that is not useful gives its place to another, or fills the batch."""
        due = self._running.pop(number)
        self._finished.append(number)
        if not useful:
            self._rejected.append(number)
            if self._replaced < self._refills:
                self._replaced += 1
                return
        self._ready[number] = due

    def draw(self) -> Batch | None:
        """The batch for the engines' version, once it is whole; takes what may be taken until then."""
        while len(self._taken) < self._size:
            number = self._next()
            if number is None:
                return None
            del self._ready[number]
            self._taken.append(number)
        return self._whole()

    def _whole(self) -> Batch:
        fillers = set(self._rejected) & set(self._taken)
        useful = set(self._taken) - fillers
        later = set(self._rejected) & self._ready.keys()  # fill the next one
        rejected = sorted(set(self._rejected) - later)
        groups = useful | set(rejected[: len(fillers)])
        batch = Batch(tuple(sorted(groups)), tuple(sorted(self._finished)), tuple(rejected[len(fillers) :]))
        self._learning, self._taken = tuple(self._taken), []
        self._finished, self._rejected, self._replaced = [], sorted(later), 0
        return batch

    def _next(self) -> int | None:
        """The oldest finished group in the window that leaves every other one a place in time."""
        oldest = min([*self._running, *self._ready], default=0)
        latest = self._latest()
        may_go = (n for n, due in self._ready.items() if n < oldest + self._window and due <= latest)
        return min(may_go, default=None)

    def _latest(self) -> int:
        """A group that is due later than this would take a place which one that is due by then needs."""
        due = collections.Counter([*self._running.values(), *self._ready.values()])
        free = self._size - len(self._taken) - 1  # places, besides the one to be given
        by_then = 0
        for version in range(self._version, self._version + self._staleness):
            by_then += due[version]
            if by_then > free + (version - self._version) * self._size:
                return version
        return self._version + self._staleness
