"""What a run has sampled and not learned from, kept for one that goes on from it: see `checkpoint.bank`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from stare_megatron.checkpoint import Bank, Banked, Outstanding, shelf_name
from stare_megatron.errors import RunError
from stare_megatron.run.sampling import Store
from stare_megatron.types import Begun, GroupRequest, GroupSummary, Trajectory

Ref = TypeVar("Ref")
Done = tuple[Ref, GroupSummary]

_FLUSH_S = 20.0


@dataclass(frozen=True)
class Restored(Generic[Ref]):
    """An outstanding group of a checkpoint. `since`: the version it was begun with; `done`: if it is finished."""

    request: GroupRequest
    since: int
    done: Done[Ref] | None = None


class Banking(Generic[Ref]):
    """Fills a run's bank, in a thread of its own, and empties it.

    Nothing depends on it: where it cannot write, the user is told once, by `note`, and what is not there is sampled
    again. `experts`: trajectories are of use only with those that they were routed to.
    """

    def __init__(self, bank: Bank, store: Store[Ref], note: Callable[[str], None], *, experts: bool = False) -> None:
        self._bank = bank
        self._store = store
        self._note = note
        self._experts = experts
        self._shelves: dict[str, tuple[int, frozenset[int]]] = {}  # step, and seeds of what the checkpoint names
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "bank")
        self._under_way: set[Future[None]] = set()
        self._closed = self._failed = False

    def restore(self, kept: Outstanding, step: int) -> list[Restored[Ref]]:
        """The outstanding groups of a checkpoint of `step`, and those that finish from now on are added to them."""
        since = kept.since or (0,) * len(kept.requests)
        found: list[Restored[Ref]] = []
        damaged = 0
        for request, begun in zip(kept.requests, since, strict=True):
            done = None
            if self._bank.has(kept.bank, request.sampling.seed):
                try:
                    banked = self._bank.take(kept.bank, request.sampling.seed)
                    if self._usable(banked.group.trajectories):
                        done = self._store.put(banked.group), banked.summary
                except (OSError, ValueError):
                    damaged += 1
            graded = tuple(of for of in request.begun.graded if self._usable([of.trajectory]))
            partial = () if self._experts else request.begun.partial
            found.append(Restored(dataclasses.replace(request, begun=Begun(graded, partial)), begun, done))
        if damaged:
            self._note(f"{damaged} groups in the run's bank are damaged: they are sampled again")
        if kept.bank:
            self._shelves[kept.bank] = step, frozenset(of.request.sampling.seed for of in found if of.done is None)
        return found

    def open(self, step: int, named: Mapping[int, Done[Ref] | None]) -> str:
        """The name of a shelf for a checkpoint of `step`, which names the groups of these seeds, some of which are
        finished; "" where none is named."""
        if not named:
            return ""
        shelf = shelf_name(step)
        self._shelves[shelf] = step, frozenset(seed for seed, done in named.items() if done is None)
        for seed, done in named.items():
            if done is not None:
                self._submit(functools.partial(self._put, shelf, seed, *done))
        return shelf

    def finished(self, seed: int, ref: Ref, summary: GroupSummary) -> None:
        """Put a group on the shelves of checkpoints that name it, unless a later policy drew a part of it."""
        newest = max((version for runs in summary.version_runs() for version, _ in runs), default=0)
        for shelf, (step, seeds) in list(self._shelves.items()):
            if seed in seeds and newest <= step:
                self._submit(functools.partial(self._put, shelf, seed, ref, summary))

    def durable(self, step: int) -> None:
        """A checkpoint of `step` is on disk: shelves of older ones are removed."""
        self._shelves = {name: held for name, held in self._shelves.items() if held[0] >= step}
        self._submit(self._clear)

    def close(self) -> None:
        """Wait, for 20 s at most, until all is on disk; what comes later is written at once."""
        concurrent.futures.wait(self._under_way, _FLUSH_S)
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _usable(self, trajectories: Iterable[Trajectory]) -> bool:
        return not self._experts or all(t.routed_experts is not None for t in trajectories)

    def _submit(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        if self._closed:
            self._guarded(job)
            return
        future = self._thread.submit(self._guarded, job)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except OSError as e:
            if not self._failed:
                self._note(f"what is sampled ahead cannot be kept, and would be sampled again: {e}")
            self._failed = True

    def _clear(self) -> None:
        # As they are when it runs: a shelf that was opened meanwhile gets its groups after it, by the same thread.
        self._bank.clear(set(self._shelves))

    def _put(self, shelf: str, seed: int, ref: Ref, summary: GroupSummary) -> None:
        if shelf not in self._shelves:
            return
        with contextlib.suppress(RunError):  # it is lost with its node: sampled again
            (group,) = self._store.fetch([ref])
            self._bank.put(shelf, Banked(seed, group, summary))
