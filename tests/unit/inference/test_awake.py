"""The clock that stands while an engine sleeps."""

from __future__ import annotations

from stare_megatron.inference.awake import AwakeClock


def test_a_clock_stands_and_goes():
    now = 5.0
    clock = AwakeClock(lambda: now)
    assert clock() == 5
    now = 7.0
    clock.stand()
    now = 100.0
    assert clock() == 7
    clock.stand()
    now = 107.0
    clock.go()
    assert clock() == 7
    now = 110.0
    clock.go()
    assert clock() == 10
    clock.stand()
    now = 200.0
    clock.go()
    now = 201.0
    assert clock() == 11
