"""What a process did, and for how long it did anything."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from stare_megatron.cluster import activity
from stare_megatron.cluster.activity import ActivityLog, busy_seconds
from stare_megatron.types.report import Activity


def test_activities_are_kept_by_their_ends_also_of_what_failed(monkeypatch):
    now = iter([0.0, 0.0, 1.0, 1.0, 3.0, 5.0])
    monkeypatch.setattr(activity.time, "monotonic", lambda: next(now))
    log = ActivityLog()
    with pytest.raises(ZeroDivisionError), log.during("outer", "x"), log.during("inner"):
        assert 1 / (next(now) - 1.0)
    assert [(a.name, a.detail, a.seconds) for a in log.take()] == [("inner", "", 1.0), ("outer", "x", 3.0)]
    assert log.take() == ()


def test_what_takes_no_time_is_left_out(monkeypatch):
    monkeypatch.setattr(activity.time, "monotonic", lambda: 7.0)
    log = ActivityLog()
    with log.during("asked"):
        pass
    assert log.take() == ()


@pytest.mark.parametrize("seed", range(20))
def test_busy_seconds_are_those_with_any_activity(seed):
    rng = random.Random(seed)
    whole = [(rng.randrange(40), rng.randrange(1, 9)) for _ in range(rng.randrange(8))]
    seconds = {t for start, length in whole for t in range(start, start + length)}
    assert busy_seconds(tuple(Activity("x", float(s), float(n)) for s, n in whole)) == len(seconds)


def test_what_goes_on_is_told_to_another_thread_with_its_own():
    log = ActivityLog()
    with log.during("sample", "p1"):
        with log.during("score"):
            pass
        with ThreadPoolExecutor(1) as other:
            (found,) = other.submit(log.open).result()
    assert (found.activity.name, found.activity.detail) == ("sample", "p1")
    assert found.activity.seconds >= 0
    assert found.thread == threading.get_ident()
    assert log.open() == ()
