"""Engines are asked how they are, and started again. Ray and the clock are stood in for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stare_megatron.cluster import families
from stare_megatron.cluster import keeper as module
from stare_megatron.cluster.fleet import State
from stare_megatron.cluster.keeper import Keeper
from stare_megatron.cluster.placement import Slot
from stare_megatron.errors import EngineLostError, RunError
from stare_megatron.types.report import RunEvent
from tests.configs import configuration

FAMILY = families.Family("node", ((7, 1.0),))


def slot(gpu: str) -> Slot:
    return Slot({}, {"CUDA_VISIBLE_DEVICES": gpu}, 0, 0)


class World:
    """Two engines. `answers`: of each engine's pulse: text, an error, or None: it does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **inference: Any) -> None:
        self.now = 100.0
        self.answers: dict[int, Any] = {0: "", 1: ""}
        self.starts: Any = FAMILY
        self.made: list[int] = []
        self.slots: dict[int, Slot] = {}
        self.killed: list[Any] = []
        self.ended: list[families.Family] = []
        self.events: list[RunEvent] = []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.ray, "wait", self.wait)
        monkeypatch.setattr(module.ray, "kill", self.killed.append)
        monkeypatch.setattr(module.runtime, "get", self.get)
        monkeypatch.setattr(module.families, "end", self.ended.append)
        monkeypatch.setattr(module.runtime, "station", lambda: None)
        crew: Any = SimpleNamespace(
            names=["engine 0 on a", "engine 1 on b"],
            nodes=["a", "b"],
            meet=lambda *_: None,
            admit=lambda *_: None,
            wait=lambda refs, *_: [FAMILY for _ in refs],
        )
        config = configuration(
            inference={"engines": 2, "answer_timeout": 60.0} | inference, cluster={"start_timeout": 300.0}
        )
        self.keeper = Keeper(config, crew, self.make, [slot("0"), slot("1")], self.events.append, pushes=True)
        self.keeper.begin()
        self.keeper.ready()
        self.keeper.pushed([0, 1], 0)
        self.events.clear()

    def make(self, i: int, slot: Slot) -> Any:
        self.made.append(i)
        self.slots[i] = slot
        return SimpleNamespace(
            hello=SimpleNamespace(remote=lambda: ("hello", i)),
            start=SimpleNamespace(remote=lambda: ("start", i)),
            pulse=SimpleNamespace(remote=lambda: ("pulse", i)),
        )

    def value(self, ref: Any) -> Any:
        kind, i = ref
        return {"pulse": self.answers[i], "start": self.starts, "hello": ""}[kind]

    def wait(self, refs: Any, **_: Any) -> Any:
        return [ref for ref in refs if self.value(ref) is not None], []

    def get(self, ref: Any, name: str, lost: Any = None) -> Any:
        found = self.value(ref)
        if isinstance(found, Exception):
            raise found
        return found

    def go(self, seconds: float, step: float = 1.0) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += step
            self.keeper.tick()

    def state(self, i: int) -> State:
        return self.keeper.fleet.state(i)


@pytest.fixture
def world(monkeypatch):
    return lambda **inference: World(monkeypatch, **inference)


def test_those_that_answer_stay(world):
    made = world()
    made.go(300)
    assert made.events == []


def test_a_silent_one_is_suspected_then_killed_with_its_processes_and_started_again(world):
    made = world()
    made.go(10)
    made.answers[1] = None
    made.go(14)
    assert made.state(1) is State.SUSPECT
    first = made.keeper.actors[1]
    made.starts = None
    made.go(56)
    assert made.killed == [first]
    assert made.ended == [FAMILY]
    assert made.state(1) is State.RESTARTING
    assert made.made == [0, 1, 1]
    made.starts, made.answers[1] = FAMILY, ""
    made.go(10)
    assert made.state(1) is State.STALE
    assert [(e.who, e.node, e.new) for e in made.events] == [
        ("engine 1", "b", name) for name in ("SUSPECT", "DEAD", "RESTARTING", "STALE")
    ]
    assert made.keeper.restarts == 1


def test_one_that_says_it_is_stopped_is_as_one_that_is_silent(world):
    made = world()
    made.answers[0] = "its process 9 is stopped"
    made.go(20)
    assert made.state(0) is State.SUSPECT
    made.answers[0] = ""
    made.go(10)
    assert made.state(0) is State.HEALTHY
    made.answers[0] = "its process 9 is stopped"
    made.go(70)
    assert "its process 9 is stopped for 60 s (inference.answer_timeout)" in [e.reason for e in made.events]


def test_a_driver_that_was_away_blames_nobody(world):
    """It was stopped with all other processes, or busy: nobody was asked meanwhile."""
    made = world()
    made.go(3)
    made.answers[1] = None
    made.go(2)
    made.go(3600, step=1800)
    assert made.state(1) in (State.HEALTHY, State.SUSPECT)
    made.answers[1] = ""
    made.go(10)
    assert made.state(1) is State.HEALTHY


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineLostError("engine 1 on b: engine 1: its vLLM process died"), "its vLLM process died"),
        (RunError("engine 1 on b: not running"), "not running"),
    ],
)
def test_one_that_answers_with_an_error_is_lost(world, error, reason):
    made = world(restarts=0)
    made.answers[1] = error
    made.go(6)
    assert (made.events[0].new, made.events[0].reason) == ("DEAD", reason)
    assert made.state(1) is State.RETIRED
    made.keeper.require()  # one of two is enough


def test_one_that_does_not_start_is_given_up_in_time(world):
    made = world()
    made.answers[1], made.starts = EngineLostError("died"), None
    made.go(8)
    made.answers[1] = ""
    assert made.state(1) is State.RESTARTING
    made.go(330)
    assert any("did not start within" in e.reason for e in made.events)


def test_one_that_fails_to_start_counts_as_lost(world):
    made = world(restarts=1, restart_backoff=1.0)
    made.answers[1], made.starts = EngineLostError("died"), RunError("engine 1: vLLM did not start: no memory")
    made.go(8)
    assert made.state(1) is State.RETIRED
    assert made.keeper.fleet.reason(1) == "vLLM did not start: no memory"


def test_nobody_is_started_while_others_need_the_memory(world):
    made = world()
    made.keeper.may_start = False
    made.answers[1] = EngineLostError("died")
    made.go(100)
    assert made.state(1) is State.DEAD
    made.keeper.may_start, made.answers[1] = True, ""
    made.go(1)
    assert made.state(1) is State.STALE


def test_errors_of_a_former_actor_blame_nobody(world):
    made = world()
    old = made.keeper.actors[0]
    made.keeper.lost(0, old, EngineLostError("engine 0: died"))
    made.go(2)
    assert made.state(0) is State.STALE
    made.keeper.lost(0, old, EngineLostError("engine 0: died"))
    assert made.state(0) is State.STALE


def test_answers_from_before_are_no_news(world):
    made = world()
    made.go(6)
    assert made.keeper.has_answered(1)
    made.answers[1] = None
    made.keeper.ask_anew([0, 1])
    assert made.keeper.has_answered(0)
    assert not made.keeper.has_answered(1)


def test_an_engine_of_a_lost_node_is_started_where_its_place_is_now(monkeypatch):
    """The one on the node that lives goes on. The other had begun to start with the GPU that it had, which may be
    another rank's where its place has come to."""
    world = World(monkeypatch)
    world.answers[1], world.starts = EngineLostError("engine 1 on b: its process died"), None
    world.go(6)
    assert (world.state(1), world.slots[1]) == (State.RESTARTING, slot("1"))
    world.keeper.move([slot("0"), slot("3")])
    assert world.state(1) is State.DEAD
    world.go(10)
    assert (world.state(1), world.slots[1]) == (State.RESTARTING, slot("3"))
    assert world.made == [0, 1, 1, 1]
    assert world.state(0) is State.HEALTHY


def test_an_engine_that_is_lost_already_is_started_once_in_its_new_place(monkeypatch):
    world = World(monkeypatch)
    world.keeper.may_start = False
    world.answers[1] = EngineLostError("engine 1 on b: its process died")
    world.go(6)
    assert world.state(1) is State.DEAD
    world.keeper.move([slot("0"), slot("3")])
    world.keeper.may_start = True
    world.go(2)
    assert (world.made, world.slots[1]) == ([0, 1, 1], slot("3"))
