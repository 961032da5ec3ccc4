"""How long a batch takes on several engines, by who is given what: the dispatcher, over engines on a simulated clock.

Lengths and machine are those of `tests/unit/rollout/test_window.py`: a 32k task, decoding at 20 ms a token and slower
with many sequences. No engine, trainer or network is measured here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from stare_megatron.cluster import runtime
from stare_megatron.cluster.dispatch import Dispatch, Limits
from stare_megatron.cluster.fleet import Fleet
from stare_megatron.cluster.lengths import Lengths
from stare_megatron.config import InferenceConfig
from stare_megatron.types import Prompt
from tests.unit.rollout.simulated_engines import LONGEST, Engine, Machine

ENGINES, BATCHES, FRESH, MANY = 4, 40, 4, 512


@dataclass(frozen=True)
class Task:
    """A batch; `slots`: sequences that an engine runs at once, about 5,000 tokens of KV cache each."""

    groups: int
    size: int
    slots: int


class Clock:
    """Engines that go on together; what they end, in the order of its time."""

    def __init__(self, slots: int) -> None:
        self.engines = [Engine(Machine(slots, 0.02, 2e-5, 0.0, 0.0)) for _ in range(ENGINES)]
        self.flying: dict[int, Any] = {}
        self.over: list[int] = []
        self.now = 0.0
        self.fleet = Fleet(InferenceConfig(engines=ENGINES), pushes=True)
        self.fleet.pushed(range(ENGINES), 0, 0.0)
        self.actors = [self.actor(i) for i in range(ENGINES)]
        self.lengths: dict[str, list[int]] = {}
        self.refs = 0

    def actor(self, i: int) -> Any:
        def run_group(request: Any, samples: tuple[int, ...]) -> tuple[str, int]:
            lengths = [self.lengths[request.prompt.id][n] for n in samples]
            summary = SimpleNamespace(num_action_tokens=tuple(lengths), reflections=(0,) * len(samples))
            self.refs += 1
            self.flying[self.refs] = summary
            self.engines[i].submit(self.refs, lengths)
            return f"group {self.refs}", self.refs

        def join(reflections: tuple[int, ...], *parts: str) -> tuple[str, int]:
            found = [self.flying[int(part.removeprefix("group "))] for part in parts]
            self.refs += 1
            tokens = tuple(n for part in found for n in part.num_action_tokens)
            self.flying[self.refs] = SimpleNamespace(num_action_tokens=tokens)
            self.over.append(self.refs)
            return f"group {self.refs}", self.refs

        return SimpleNamespace(run_group=SimpleNamespace(remote=run_group), join=SimpleNamespace(remote=join))

    def first(self, flying: Any, what: str, changed: Any) -> int:
        while not self.over:
            ends = [e.now + (e.running[0][0] - e.done) * self.speed(e) for e in self.engines if e.running]
            self.now = min(ends)
            self.over = [ref for engine in self.engines for ref in engine.until(self.now)]
        return self.over.pop(0)

    def speed(self, engine: Engine) -> float:
        return engine.machine.step + engine.machine.more * len(engine.running)

    def get(self, ref: int, name: str, lost: Any) -> Any:
        return self.flying[ref]

    def tick(self) -> bool:
        return False

    def require(self) -> None: ...


def seconds(monkeypatch: pytest.MonkeyPatch, task: Task, limits: Limits) -> float:
    """Of a batch, on average, of prompts that come again every fourth: what is known of them is of the time before."""
    clock = Clock(task.slots)
    crew = SimpleNamespace(first=clock.first, names=[f"engine {i}" for i in range(ENGINES)])
    monkeypatch.setattr(runtime, "get", clock.get)
    dispatcher = Dispatch(clock, crew, limits)  # pyright: ignore
    rng, found = random.Random(7), []
    hard = {f"p{n}": rng.gauss(8.1, 0.7) for n in range(task.groups * FRESH)}
    for batch in range(BATCHES):
        names = [f"p{(batch * task.groups + n) % len(hard)}" for n in range(task.groups)]
        rng.shuffle(names)
        draw = random.Random(batch)
        clock.lengths = {name: [length(draw, hard[name]) for _ in range(task.size)] for name in names}
        prompts = [Prompt(name, "s", "q", (1,) * 200, "a") for name in names]
        dispatcher.submit([SimpleNamespace(group_size=task.size, prompt=prompt) for prompt in prompts])  # pyright: ignore
        began = clock.now
        got = [request.prompt.id for request, _, _ in dispatcher.results(lambda _: None, lambda: None)]
        assert sorted(got) == sorted(names)
        found.append(clock.now - began)
    known = found[FRESH:]
    return sum(known) / len(known)


def length(draw: random.Random, hard: float) -> int:
    return max(16, min(LONGEST, round(draw.lognormvariate(hard, 0.6))))


# Seconds of a batch by the dispatcher that knew no lengths and pinned groups, by how much longer it took than: one that
# serves the longest first and counts tokens; one that spreads; one that does both.
@pytest.mark.parametrize(
    ("task", "longest", "spread", "both"),
    [
        (Task(32, 8, slots=8), 1.16, 1.02, 1.19),
        (Task(32, 8, slots=16), 1.18, 1.01, 1.19),
        (Task(32, 8, slots=32), 1.06, 1.00, 1.06),
        (Task(10, 64, slots=32), 1.22, 1.12, 1.35),
        (Task(5, 64, slots=128), 1.00, 1.01, 1.01),
    ],
)
def test_what_order_and_spread_are_worth(monkeypatch, task: Task, longest: float, spread: float, both: float) -> None:
    """docs/dispatch.md has these numbers."""
    ordered = seconds(monkeypatch, task, Limits(MANY, longest_first=True))
    both_of_them = seconds(monkeypatch, task, Limits(MANY, 1024, longest_first=True))
    monkeypatch.setattr(Lengths, "saw", lambda *_: None)
    before = seconds(monkeypatch, task, Limits(MANY))
    spread_alone = seconds(monkeypatch, task, Limits(MANY, 1024))
    found = [before / after for after in (ordered, spread_alone, both_of_them)]
    assert found == pytest.approx([longest, spread, both], abs=0.011)
