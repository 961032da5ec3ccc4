"""Engines and a trainer on a clock that only they move: a synchronous run and one that is ahead, in simulated hours."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stare_megatron.rollout.window import Window

LONGEST = 32_768


@dataclass(frozen=True)
class Machine:
    """`step` seconds of an engine for a token of each sequence that runs, and `more` for each of these; `slots`
    sequences run at once. `learn`, `push`: of a step, seconds."""

    slots: int
    step: float
    more: float
    learn: float
    push: float


@dataclass
class Engine:
    """Sequences that advance together, a token at a time; a group is over with its longest."""

    machine: Machine
    now: float = 0.0
    done: float = 0.0  # tokens that a sequence which always ran has
    waiting: list[tuple[int, int]] = field(default_factory=list)  # (group, tokens), first in, first out
    running: list[tuple[float, int]] = field(default_factory=list)  # (tokens done when it ends, group)
    left: dict[int, int] = field(default_factory=dict)

    def submit(self, group: int, lengths: list[int]) -> None:
        self.left[group] = len(lengths)
        self.waiting += [(group, n) for n in lengths]
        self._start()

    def _start(self) -> None:
        while self.waiting and len(self.running) < self.machine.slots:
            group, tokens = self.waiting.pop(0)
            heapq.heappush(self.running, (self.done + tokens, group))

    def until(self, end: float) -> Iterator[int]:
        """The groups that end before a time, which is then."""
        while self.running:
            speed = self.machine.step + self.machine.more * len(self.running)
            ends, group = self.running[0]
            at = self.now + (ends - self.done) * speed
            if at > end:
                self.done += (end - self.now) / speed
                break
            heapq.heappop(self.running)
            self.now, self.done = at, ends
            self._start()
            self.left[group] -= 1
            if not self.left[group]:
                yield group
        self.now = end if end < float("inf") else self.now


@dataclass
class Trained:
    """What a run learned from: of each group its version at admission, the one that learned, and its lengths; and the
    lengths of all that was admitted, in order."""

    seconds: float = 0.0
    groups: list[tuple[int, int, int]] = field(default_factory=list)
    admitted: list[list[int]] = field(default_factory=list)


def run(machine: Machine, window: Window, lengths: Callable[[], list[int]], steps: int, *, ahead: bool) -> Trained:
    """A run of some steps. `ahead`: engines go on while the trainer learns; else they wait."""
    engine, found = Engine(machine), Trained()
    version_of: dict[int, int] = {}

    def admit() -> None:
        while place := window.admit():
            version_of[place.number] = place.version
            found.admitted.append(lengths())
            engine.submit(place.number, found.admitted[-1])

    for step in range(steps):
        window.begin(step)
        admit()
        batch = window.draw()
        for group in engine.until(float("inf")) if batch is None else ():
            window.finish(group, useful=True)
            admit()
            if batch := window.draw():
                break
        assert batch is not None, "every group is finished, and no batch can be made"
        found.groups += [(number, version_of[number], step) for number in batch.groups]
        admit()
        learned = engine.now + machine.learn
        if ahead:
            for group in engine.until(learned):
                window.finish(group, useful=True)
                admit()
        engine.now = learned + machine.push  # nobody samples while weights change
    found.seconds = engine.now
    return found


def long_tailed(seed: int, size: int) -> Callable[[], list[int]]:
    """Lengths of the samples of groups, as of a 32k task: log-normal between prompts and within them, mean about 5,000,
    some cut at 32,768: longest by mean 6.6, as published for one (docs/sampling.md)."""
    rng = random.Random(seed)

    def group() -> list[int]:
        hard = rng.gauss(8.1, 0.7)
        return [max(16, min(LONGEST, round(rng.lognormvariate(hard, 0.6)))) for _ in range(size)]

    return group


def all_lengths(groups: list[list[int]]) -> list[int]:
    return sorted(itertools.chain.from_iterable(groups))
