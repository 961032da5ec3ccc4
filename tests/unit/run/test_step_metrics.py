"""Parts of a step's metrics that are put together from several places."""

import os

import pytest

from stare_megatron.host.memory import host_memory
from stare_megatron.rollout.collect import SourceStats
from stare_megatron.run.step_metrics import source_metrics
from stare_megatron.types import Control, GateDuty


def test_sources_of_one_label_are_weighed_by_their_trajectories():
    labels = {"a/b": "a_b", "rare": "other", "rarer": "other", "absent": "absent"}
    by_source = {"a/b": SourceStats(4, 0.5, 0.25), "rare": SourceStats(6, 1.0, 1.0), "rarer": SourceStats(2, 0.0, 0.0)}
    assert source_metrics(by_source, labels) == {
        "source/a_b/reward": 0.5,
        "source/a_b/correct": 0.25,
        "source/other/reward": pytest.approx(0.75),
        "source/other/correct": pytest.approx(0.75),
    }


def test_gate_duty_counts_steps():
    assert GateDuty(3, 1).after(Control(True, 1.1, 0.9, 0.1, 0.2)) == GateDuty(4, 2)


def test_host_memory_counts_what_this_process_holds():
    before = host_memory()
    held = bytearray(os.urandom(1)) * (64 << 20)
    after = host_memory()
    assert 60 << 20 < after.run - before.run < 80 << 20
    assert after.available > 0
    assert len(held) == 64 << 20
