"""A rank's part in sharded pushes, whose parameters may be away."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from stare_megatron.cluster import weights
from stare_megatron.cluster.weights import ShardedRank
from stare_megatron.errors import RunError
from stare_megatron.models.boxes import Box
from stare_megatron.sync import sharded


class Trainer:
    """Its parameters have values only within `parameters_at_hand`."""

    def __init__(self) -> None:
        self.weight = torch.arange(12.0).reshape(3, 4)
        self.values = self.weight.clone()
        self.weight.untyped_storage().resize_(0)
        self.times = 0

    @contextlib.contextmanager
    def parameters_at_hand(self):
        self.weight.untyped_storage().resize_(48)
        self.weight.copy_(self.values)
        self.times += 1
        yield
        self.weight.untyped_storage().resize_(0)

    def holdings(self):
        yield Box("a.weight", (1, 0), (3, 4)), self.weight[1:]

    def weight_metadata(self):
        return [("a.weight", torch.float32, (3, 4))]


def test_parameters_are_at_hand_whenever_a_push_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    seen: list[list[float]] = []

    class Pusher(sharded.ShardedPusher):
        def connect(self, engines: Any) -> list[str]:
            return list(engines)

        def push(self, version: int, engines: Any = None) -> int:
            seen.extend(view.flatten().tolist() for _, view in self._holdings())
            return 0

        sums = push  # type: ignore[assignment]

    monkeypatch.setattr(weights.runtime, "node_address", lambda: "127.0.0.1")
    monkeypatch.setattr(sharded, "ShardedPusher", Pusher)
    rank = ShardedRank(trainer, 0, 1)  # type: ignore[arg-type]
    address = rank.open()
    assert rank.join({"engine 0": None}, 1, address) == ["engine 0"]
    rank.push(1, None)
    rank.sums({"a.weight"})
    assert seen == [trainer.values[1:].flatten().tolist()] * 2
    assert trainer.times == 3
    assert trainer.weight.untyped_storage().size() == 0


def test_nothing_is_pushed_before_an_engine_has_joined() -> None:
    with pytest.raises(RunError, match="before an engine has joined"):
        ShardedRank(Trainer(), 0, 1).push(1, None)  # type: ignore[arg-type]
