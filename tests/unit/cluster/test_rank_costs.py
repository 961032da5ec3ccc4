"""What a rank's phases take, as the driver is told of it."""

from __future__ import annotations

import pytest
import torch

from stare_megatron.cluster.rank_costs import RankCosts
from stare_megatron.host import device
from stare_megatron.metrics.catalogue import by_name
from stare_megatron.metrics.reduce import reduce

MB = 2**20


def of(*ranks: RankCosts) -> dict[str, float]:
    return by_name(reduce(part for rank in ranks for part in rank.take()))


def test_each_phase_has_a_peak_of_its_own_and_the_rank_the_largest() -> None:
    """Of this process, whose kernel must let it forget its peak."""
    costs = RankCosts(1)
    with costs.phase("score"):
        memory = torch.ones(64 * MB, dtype=torch.uint8)
        del memory
    with costs.phase("update"):
        pass
    most = costs.peak()
    found = of(costs)
    assert found["memory/trainer_peak_score"] - found["memory/trainer_peak_update"] == pytest.approx(64, abs=16)
    assert found["memory/trainer_peak_score"] <= most / MB
    assert found["memory/trainer_peak_push"] == 0  # there was none
    assert of(costs)["memory/trainer_peak_score"] == 0


def test_other_calls_have_no_peak_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "forget_peak", lambda: pytest.fail("it was no phase"))
    with RankCosts(1).phase("token_records"):
        pass


def test_rates_are_of_all_ranks_together() -> None:
    """Two ranks that send 3 and 1 GB in 2 seconds: 2 GB/s."""
    ranks = RankCosts(2), RankCosts(2)
    for rank, size in zip(ranks, (3e9, 1e9), strict=True):
        rank.moved("push", int(size) // 2, 1.0)
        rank.moved("push", int(size) // 2, 1.0)
    ranks[0].moved("save", 6 * MB, 0.5)
    found = of(*ranks)
    assert found["rates/push_gbps"] == pytest.approx(2.0)
    assert found["throughput/pushed"] == pytest.approx(4e9 / MB)
    assert found["throughput/saved"] == 6
    assert found["rates/save_gbps"] == pytest.approx(6 * MB / 1e9 / 0.25)
    again = of(*ranks)
    assert again["throughput/pushed"] == 0
    assert again["rates/save_gbps"] != again["rates/save_gbps"]  # NaN: there was none
