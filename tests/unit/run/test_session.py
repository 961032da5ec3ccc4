"""In which order a session starts its parts; the parts themselves are stood in for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stare_megatron.host import device
from stare_megatron.run import folder as run_folder
from stare_megatron.run import session, sizing
from tests.configs import configuration


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in its order."""
    said: list[str] = []

    def part(name: str) -> Any:
        def make(config: Any, *_: Any, **__: Any) -> Any:
            said.append(f"{name} start")
            if name == "engines":
                said.append(f"seqs {config.inference.vllm.get('max_num_seqs')}")
            return SimpleNamespace(
                prepare=lambda: said.append(f"{name} prepare"),
                begin=lambda: said.append(f"{name} begin"),
                ready=lambda *_: said.append(f"{name} ready"),
                close=lambda: said.append(f"{name} close"),
                connect=lambda *_: said.append("connect") or [],
                check=lambda: said.append("check"),
                settle=lambda: said.append(f"{name} settle"),
                move=lambda slots: said.append(f"{name} move"),
                actors=[],
                crew=SimpleNamespace(names=[]),
            )

        return make

    for name, kind in (("engines", "EngineGroup"), ("ranks", "TrainerGroup"), ("sandboxes", "Sandboxes")):
        monkeypatch.setattr(session, kind, part(name))
    monkeypatch.setattr(session.doctor, "short", lambda *_: None)
    monkeypatch.setattr(session.runtime, "cluster", lambda *_: contextlib.nullcontext())
    places = SimpleNamespace(
        trainers=(),
        engines=(),
        sandboxes=(),
        gpu_bytes=0,
        release=lambda: None,
        renewed=lambda: said.append("room") or places,
    )
    monkeypatch.setattr(session.placement, "plan", lambda *_, **__: places)
    monkeypatch.setattr(session, "read_hf_config", lambda _: SimpleNamespace(sequence_cost=None))
    monkeypatch.setattr(run_folder, "parameter_count", lambda _: 0)
    return said


@pytest.mark.parametrize("placement", ["colocated", "separate"])
@pytest.mark.parametrize("where", list(device.Device))
def test_engines_measure_a_gpu_when_the_ranks_have_taken_theirs(monkeypatch, order, where, placement):
    """vLLM takes what goes of the GPU while it profiles for its own. Elsewhere nothing waits for anything."""
    monkeypatch.setattr(device, "current", lambda: where)
    config = configuration(inference={"placement": placement})
    with session.open_session(config, Path("logs"), lambda _: None, sizing.Load(800, 8)):
        assert order[-1] == "connect"
    in_turn = where is device.Device.CUDA and placement == "colocated"
    assert (order.index("ranks ready") < order.index("engines begin")) == in_turn
    assert ("engines prepare" in order) == in_turn  # they import meanwhile
    assert order.index("engines start") < order.index("ranks start")
    assert order.index("connect") > max(order.index("ranks ready"), order.index("engines ready"))
    assert sorted(o for o in order if o.endswith("close")) == ["engines close", "ranks close", "sandboxes close"]
    # Numbers of a CPU run depend on no estimate.
    assert ("seqs None" in order) == (where is device.Device.CPU)
    assert ("seqs 808" in order) == (where is device.Device.CUDA)


def test_the_arenas_are_told(monkeypatch, order):
    monkeypatch.setattr(device, "current", lambda: device.Device.CPU)
    monkeypatch.setattr(sizing, "arena_bytes", lambda *_: 3 << 29)
    config = configuration(trainer={"offload": ["optimizer"], "world_size": 2, "tensor_parallel": 2})
    said: list[str] = []
    with session.open_session(config, Path("logs"), said.append, sizing.Load(8, 8)):
        pass
    assert "trainer.offload: 1.50 GiB of host memory for each of 2 trainer ranks" in said
    said.clear()
    with session.open_session(config, Path("logs"), said.append, sizing.Load(8, 8), trainers=False):
        pass
    assert not any("offload" in text for text in said)


def test_the_user_is_told_what_is_waited_for_at_the_end(monkeypatch, order):
    monkeypatch.setattr(device, "current", lambda: device.Device.CPU)
    said: list[str] = []
    for trainers in (True, False):
        with session.open_session(configuration(), Path("logs"), said.append, sizing.Load(8, 8), trainers=trainers):
            said.clear()
        assert said == ["ending engines and trainer ranks" if trainers else "ending engines"]


def test_ranks_that_were_lost_are_started_again_and_engines_stay(monkeypatch, order):
    monkeypatch.setattr(device, "current", lambda: device.Device.CPU)
    with session.open_session(configuration(), Path("logs"), lambda _: None, sizing.Load(8, 8)) as opened:
        first, engines = opened.trainers, opened.engines
        order.clear()
        opened.restart_trainers()
        assert order == [
            "ranks close",
            "engines settle",
            "room",
            "engines move",
            "ranks start",
            "ranks ready",
            "connect",
        ]
        assert opened.trainers is not first
        assert opened.engines is engines
        order.clear()
        engines.beside()  # who is looked after while groups are sampled: the ranks of now
    assert order == ["check", "ranks close", "ranks close", "engines close", "sandboxes close"]


def test_a_session_without_ranks_has_none(monkeypatch, order):
    monkeypatch.setattr(device, "current", lambda: device.Device.CPU)
    with (
        session.open_session(
            configuration(), Path("logs"), lambda _: None, sizing.Load(8, 8), trainers=False
        ) as opened,
        pytest.raises(RuntimeError, match="has no trainer ranks"),
    ):
        opened.restart_trainers()
    assert not any(said.startswith("ranks") for said in order)
