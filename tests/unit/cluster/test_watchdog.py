"""How long a silence may be."""

from __future__ import annotations

import math

import pytest

from stare_megatron.cluster.watchdog import Watchdog
from stare_megatron.config.watchdog import WatchdogConfig


def watchdog(**settings: float) -> Watchdog:
    return Watchdog(WatchdogConfig(first=1800.0, **settings))


def spend(dog: Watchdog, phase: str, what: str, *silences: float) -> None:
    with dog.during(phase):
        for silence in silences:
            dog.answered(what, silence)


def limit(dog: Watchdog, phase: str, what: str) -> float:
    with dog.during(phase):
        return dog.limit(what)


def test_the_first_three_phases_have_a_limit_of_their_own():
    dog = watchdog()
    for _ in range(2):
        spend(dog, "update", "update", 20.0)
        assert limit(dog, "update", "update") == 1800
    spend(dog, "update", "update", 30.0)
    assert limit(dog, "update", "update") == 200  # ten times the median
    assert limit(dog, "score", "update") == 1800  # another phase
    assert limit(dog, "update", "load") == 1800  # another wait


def test_the_longest_silence_of_a_phase_counts_not_each():
    """A rollout whose groups come one after the other at its beginning, and late at its end."""
    dog = watchdog()
    for _ in range(4):
        spend(dog, "rollout", "sample", *[0.1] * 20, 60.0)
    assert limit(dog, "rollout", "sample") == 600


def test_a_limit_is_at_least_the_floor_and_three_times_the_longest():
    dog = watchdog(floor=50.0)
    for silence in (0.1, 0.1, 0.1, 0.1):
        spend(dog, "save", "save_written", silence)
    assert limit(dog, "save", "save_written") == 50
    spend(dog, "save", "save_written", 40.0)
    assert limit(dog, "save", "save_written") == 120


def test_the_hard_limit_is_above_all_and_factor_zero_leaves_it_alone():
    assert limit(watchdog(limit=600.0), "update", "update") == 600
    assert limit(watchdog(factor=0.0, limit=600.0), "update", "update") == 600
    assert limit(watchdog(factor=0.0), "update", "update") == math.inf


def spoil(dog: Watchdog) -> None:
    dog.answered("update", 1.0)
    raise ZeroDivisionError


def test_a_phase_that_failed_is_not_remembered():
    dog = watchdog()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), dog.during("update"):
            spoil(dog)
    assert limit(dog, "update", "update") == 1800


def test_waits_between_phases_have_their_own_past():
    dog = watchdog(floor=5.0)
    for _ in range(3):
        dog.answered("report", 1.0)
    assert dog.limit("report") == 10
    assert limit(dog, "update", "report") == 1800
