"""What the engines' handle tells of losses, with stand-ins for engines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stare_megatron.cluster.engines import EngineGroup
from stare_megatron.cluster.fleet import State
from stare_megatron.types.report import RunEvent


def group(states: list[State], again: int = 0) -> tuple[Any, list[RunEvent]]:
    """A handle on engines in these states, all of which have answered; what it tells."""
    told: list[RunEvent] = []
    fleet = SimpleNamespace(state=states.__getitem__, those=lambda *of: [i for i, s in enumerate(states) if s in of])
    return SimpleNamespace(
        _keeper=SimpleNamespace(fleet=fleet, ask_anew=lambda _: None, has_answered=lambda _: True, restarts=0),
        _crew=SimpleNamespace(names=[f"engine {i}" for i in range(len(states))]),
        _dispatch=SimpleNamespace(take_again=lambda: again),
        _tell=told.append,
    ), told


def test_a_push_that_an_engine_did_not_outlive_is_an_event() -> None:
    engines, told = group([State.STALE, State.DEAD, State.RESTARTING])
    assert EngineGroup.any_lost(engines, [0, 1, 2])
    assert [(e.who, e.new, e.reason) for e in told] == [("push", "FAILED", "engine 1, engine 2 lost in it")]


def test_a_push_that_failed_with_all_engines_alive_is_none() -> None:
    engines, told = group([State.STALE, State.DEAD])
    assert not EngineGroup.any_lost(engines, [0])
    assert told == []


def test_what_is_sampled_again_is_an_event() -> None:
    engines, told = group([State.HEALTHY, State.DEAD], again=3)
    assert {m.name: m.total for m in EngineGroup.measured(engines)} == {
        "fleet/healthy": 1,
        "fleet/restarts": 0,
        "fleet/groups_again": 3,
    }
    assert [(e.who, e.new) for e in told] == [("sampling", "AGAIN")]
    assert "3 groups" in told[0].reason
    engines, told = group([State.HEALTHY])
    EngineGroup.measured(engines)
    assert told == []
