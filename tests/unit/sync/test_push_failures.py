"""A push in which engines fail: rank 0 ends the pass over the weights that it makes with the other ranks."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stare_megatron.errors import EngineLostError, RunError
from stare_megatron.sync.push import WeightPusher
from stare_megatron.sync.sharded import ShardedPusher
from stare_megatron.sync.source import ParamSpec, WeightStream

NAMES = ("a", "b", "c")


def pusher(fails_after: int | None, transport: str = "gloo") -> tuple[WeightPusher, list[str]]:
    """`fails_after`: tensors that are sent before an engine fails; None: it fails before the first is asked for."""
    passed: list[str] = []

    def tensors():
        for name in NAMES:
            passed.append(name)
            yield name, torch.zeros(2)

    stream = WeightStream(tuple(ParamSpec(name, torch.float32, (2,)) for name in NAMES), tensors)
    made = WeightPusher(transport, 0, stream, SimpleNamespace(workers=(1,)), "here")  # pyright: ignore

    def send_weights() -> None:
        if fails_after is not None:
            source = made._stream.checked()
            for _ in range(fails_after):
                next(source)
        raise RuntimeError("engine 1: its process died")

    engine: Any = SimpleNamespace(send_weights=send_weights)
    made._engine = engine
    return made, passed


@pytest.mark.parametrize("fails_after", [None, 0, 1, 2, 3])
def test_the_pass_is_made_to_its_end_once(fails_after):
    made, passed = pusher(fails_after)
    for push in (1, 2):
        with pytest.raises(RuntimeError, match="engine 1: its process died"):
            made.push(push)
        assert passed == [*NAMES] * push


def test_where_all_ranks_send_nobody_can_end_it_for_the_others():
    made, passed = pusher(1, "cuda_ipc")
    with pytest.raises(RuntimeError, match="died"):
        made.push(1)
    assert passed == ["a"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sharded_push_that_failed_leaves_no_rank_waiting(rank):
    """An engine that lives and was never told to receive closes its end; one that is gone cannot, and says why."""
    told: list[str] = []
    closed: list[str] = []

    def engine(name: str) -> Any:
        def give_up() -> None:
            told.append(name)
            if name == "engine 1":
                raise EngineLostError("engine 1: its process died")

        link = SimpleNamespace(name=name, close=lambda: closed.append(name))
        return SimpleNamespace(client=SimpleNamespace(give_up_weight_update=give_up), link=link)

    both = [engine("engine 0"), engine("engine 1")]
    made: Any = ShardedPusher.__new__(ShardedPusher)
    made._rank, made._outbox = rank, SimpleNamespace(forget=lambda: None)
    made._engines = {e.link.name: e for e in both}
    made._give_up(both, [], RunError, RunError("engine 1 ended"), None)
    until = time.monotonic() + 120
    while len(told) < 2 and rank == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(told) == (["engine 0", "engine 1"] if rank == 0 else [])
    assert closed == ["engine 0", "engine 1"]
    assert made._engines == {}
