"""The states of engines: every state with every event, and what restarts, silence and pushes make of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron.cluster.fleet import FORGIVEN_S, NEXT, UP, Event, Fleet, State
from stare_megatron.config import InferenceConfig
from tests.properties import bounded

# A row a state, a column an event; `.`: nothing changes.
TABLE = """
            SILENT   ANSWERED OUTDATED LOST  RESTARTED  SPENT   STARTED PUSHED
STALE       SUSPECT  .        .        DEAD  .          .       .       HEALTHY
HEALTHY     SUSPECT  .        STALE    DEAD  .          .       .       .
SUSPECT     .        HEALTHY  STALE    DEAD  .          .       .       HEALTHY
DEAD        .        .        .        .     RESTARTING RETIRED .       .
RESTARTING  .        .        .        DEAD  .          .       STALE   .
RETIRED     .        .        .        .     .          .       .       .
"""


def test_the_table_is_the_documented_one():
    (events, *rows) = (line.split() for line in TABLE.strip().splitlines())
    assert {e.name for e in Event} == set(events)
    assert {s.name for s in State} == {row[0] for row in rows}
    for state, *cells in rows:
        for event, new in zip(events, cells, strict=True):
            expected = None if new == "." else State[new]
            assert NEXT.get((State[state], Event[event])) is expected, (state, event)


def fleet(engines: int = 2, *, pushes: bool = True, **settings: float) -> Fleet:
    made = Fleet(InferenceConfig(engines=engines, **settings), pushes)  # pyright: ignore
    if pushes:
        made.pushed(range(engines), 0, 0.0)
    return made


def come_back(made: Fleet, engine: int, now: float) -> None:
    made.restarted(engine)
    made.started(engine, now)


def test_engines_begin_without_the_weights_and_get_no_groups():
    made = Fleet(InferenceConfig(engines=2), pushes=True)
    assert made.those(State.STALE) == [0, 1]
    changes = made.pushed([0, 1], 0, 1.0)
    assert [(c.engine, c.new, c.news) for c in changes] == [(0, State.HEALTHY, False), (1, State.HEALTHY, False)]
    assert made.pushed([0, 1], 1, 2.0) == []


def test_without_a_trainer_the_weights_on_disk_are_the_right_ones():
    made = fleet(pushes=False)
    assert made.those(State.HEALTHY) == [0, 1]
    made.lost(0, 1.0, "died")
    come_back(made, 0, 2.0)
    assert made.state(0) is State.HEALTHY


def test_one_that_comes_back_serves_after_a_push_of_its_own():
    made = fleet()
    made.pushed([0, 1], 7, 1.0)
    made.lost(1, 2.0, "died")
    come_back(made, 1, 30.0)
    assert made.state(1) is State.STALE
    made.answered(1)
    assert made.state(1) is State.STALE  # being well is not enough
    (change,) = made.pushed([1], 7, 31.0)
    assert (change.new, change.reason, change.news) == (State.HEALTHY, "it holds version 7", True)
    assert made.those(State.HEALTHY) == [0, 1]


def test_one_that_was_left_out_of_a_push_is_stale():
    made = fleet()
    made.silent(1, 11.0, 20.0, "no answer")
    made.pushed([0], 1, 21.0)
    assert made.those(State.STALE) == [1]
    made.pushed([0, 1], 2, 22.0)
    assert made.those(State.HEALTHY) == [0, 1]


def test_silence():
    made = fleet(answer_timeout=60.0)
    assert made.silent(0, 9.9, 10.0, "no answer") == []
    (change,) = made.silent(0, 10.0, 10.0, "no answer")
    assert (change.new, change.reason) == (State.SUSPECT, "no answer for 10 s")
    made.answered(0)
    assert made.state(0) is State.HEALTHY
    (change,) = made.silent(0, 60.0, 90.0, "its process 7 is stopped")
    assert change.new is State.DEAD
    assert made.reason(0) == "its process 7 is stopped for 60 s (inference.answer_timeout)"


def test_restarts_wait_longer_each_time_and_end():
    made = fleet(restarts=3, restart_backoff=5.0)
    now, waits = 100.0, []
    while made.lost(0, now, "died") and made.state(0) is State.DEAD:
        wait = next(w for w in itertools.count() if made.due(now + w))
        waits.append(wait)
        now += wait
        come_back(made, 0, now)
    assert waits == [0, 5, 10]
    assert made.state(0) is State.RETIRED
    assert made.due(1e9) == []


def test_an_hour_of_health_forgives():
    made = fleet(restarts=1)
    for day in range(1, 5):
        assert made.lost(0, day * 86400.0, "died")
        assert made.state(0) is State.DEAD
        come_back(made, 0, day * 86400.0 + 60)
        made.pushed([0, 1], day, day * 86400.0 + 61)
    made.lost(0, 4 * 86400.0 + 60 + FORGIVEN_S, "died")
    assert made.state(0) is State.RETIRED


def test_one_that_never_gets_well_is_not_forgiven():
    made = fleet(restarts=1)
    made.lost(0, 1.0, "died")
    made.restarted(0)
    made.lost(0, 1.0 + 2 * FORGIVEN_S, "did not start")
    assert made.state(0) is State.RETIRED


@pytest.mark.parametrize(("engines", "wanted", "enough"), [(1, 0, 1), (2, 0, 1), (3, 0, 2), (16, 0, 8), (4, 4, 4)])
def test_the_fewest_engines(engines, wanted, enough):
    made = fleet(engines, min_engines=wanted, restarts=0)
    for i in range(engines - enough):
        made.lost(i, 1.0, "died")
    assert made.too_few == ""
    made.lost(engines - 1, 1.0, "its process died")
    assert made.too_few == (
        f"engine {engines - 1}: its process died; {enough - 1} of {engines} engines are left, the run wants {enough} "
        "(inference.min_engines)"
    )


def test_more_than_there_are_cannot_be_wanted():
    with pytest.raises(ValueError, match="min_engines = 3 of engines = 2; lower it"):
        InferenceConfig(engines=2, min_engines=3)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(["answered", "silent", "lost", "restarted", "started", "pushed", "all"])
    ),
    max_size=60,
)


@bounded(100)
@given(STEPS, st.integers(0, 3))
def test_nobody_serves_old_weights_or_starts_too_often(steps, restarts):
    """Whatever happens in whatever order: HEALTHY means the newest version, and a retired engine stays so."""
    made = fleet(3, restarts=restarts, restart_backoff=0.0)
    version, holds, starts, retired = 0, [0, 0, 0], [0, 0, 0], set()
    for now, (i, what) in enumerate(steps, 1):
        if what == "answered":
            made.answered(i)
        elif what == "silent":
            made.silent(i, 11.0, now, "no answer")
        elif what == "lost":
            made.lost(i, now, "died")
        elif what == "restarted" and i in made.due(now):
            made.restarted(i)
            starts[i] += 1
            holds[i] = -1
        elif what == "started":
            made.started(i, now)
        elif what == "pushed" and made.state(i) in UP:
            made.pushed([i], version, now)
            holds[i] = version
        elif what == "all":
            version += 1
            ready = made.those(State.HEALTHY, State.STALE)
            made.pushed(ready, version, now)
            for j in ready:
                holds[j] = version
        assert all(holds[j] == version for j in made.those(State.HEALTHY))
        assert all(n <= restarts for n in starts)
        assert retired <= set(made.those(State.RETIRED))
        retired = set(made.those(State.RETIRED))
