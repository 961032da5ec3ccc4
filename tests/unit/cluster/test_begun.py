"""What engines are at, asked by the driver: of those that answer soon; the others cost what they had."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from stare_megatron.cluster import engines, runtime
from stare_megatron.cluster.engine_actor import EngineActor
from stare_megatron.cluster.engines import EngineGroup
from stare_megatron.errors import EngineLostError
from stare_megatron.types import Begun


def actor(answer: Any) -> Any:
    return SimpleNamespace(begun=SimpleNamespace(remote=lambda: answer))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four engines: one answers, one dies, one is silent, one is not up. An answer stands for its own reference."""
    answers = ["told", "dead", "silent", "down"]

    def wait(refs: Sequence[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert (num_returns, timeout) == (len(refs), engines._BEGUN_S)
        return [ref for ref in refs if ref != "silent"], ["silent"]

    def get(ref: str, name: str, lost: type[Exception]) -> dict[int, Begun]:
        if ref == "dead":
            raise lost(f"{name}: gone")
        assert (ref, name, lost) == ("told", "engine 0", EngineLostError)
        return {7: Begun()}

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(runtime, "get", get)
    return SimpleNamespace(
        actors=[actor(answer) for answer in answers],
        _keeper=SimpleNamespace(fleet=SimpleNamespace(those=lambda *states: [0, 1, 2])),
        _crew=SimpleNamespace(names=[f"engine {i}" for i in range(4)]),
    )


def test_who_does_not_answer_costs_only_what_it_had(group: Any) -> None:
    assert EngineGroup.begun(group) == {7: Begun()}


def test_nobody_is_waited_for_where_nobody_is_up(group: Any) -> None:
    group._keeper.fleet.those = lambda *states: []
    assert EngineGroup.begun(group) == {}


def test_an_actor_tells_of_its_groups_what_its_engine_has_drawn() -> None:
    async def drawn() -> dict[int, str]:
        return {3: "tokens"}

    mine = SimpleNamespace(_engine=SimpleNamespace(drawn=drawn), _run=SimpleNamespace(begun=lambda of: {9: of}))
    kind = EngineActor.__ray_metadata__.modified_class
    assert asyncio.run(kind.begun(mine)) == {9: {3: "tokens"}}
