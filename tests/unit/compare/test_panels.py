"""What the panels of a comparison show."""

from __future__ import annotations

from types import SimpleNamespace

from stare_megatron.compare.panels import phases


def test_phases_are_parts_of_a_step_each_once():
    names = ("time/rollout", "time/step", "time/elapsed", "time/onload", "time/offload", "time/update", "reward/mean")
    runs = [SimpleNamespace(series=dict.fromkeys(names)), SimpleNamespace(series={"time/save": None})]
    assert phases(runs) == ["time/rollout", "time/update", "time/save"]  # type: ignore[arg-type]
