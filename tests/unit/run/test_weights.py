"""The probe after a push: when, on what, and whom it names. What it finds: tests/unit/sync/test_probe_faults.py."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest

from stare_megatron.cluster.trainers import TrainerGroup
from stare_megatron.config import SyncConfig
from stare_megatron.errors import EngineLostError, RanksLostError, RunError
from stare_megatron.run.weights import Weights

TOKENS = np.array([3, 9, 4], np.int32)
OURS = np.array([-1.0, -2.0], np.float32)


def weights(gaps=(0.0, 0.0), **sync) -> Weights:
    def asked(tokens):
        assert tokens is TOKENS
        return OURS

    trainers = SimpleNamespace(score_tokens=asked, checksums=lambda: {"embed": "1", "norm": "2"})
    engines = SimpleNamespace(
        logprobs=lambda tokens: {i: OURS + np.float32(gap) for i, gap in enumerate(gaps)},
        checksums=lambda *_: {0: {"embed": "1", "norm": "2"}, 1: {"embed": "1", "norm": "3"}},
    )
    return Weights(SyncConfig(**sync), "float32", trainers, engines, lambda: TOKENS)


def probed(made: Weights, version: int) -> float:
    return made.probe(version, made.score_probe(version))


def test_the_largest_difference_of_the_engines():
    assert probed(weights((1e-4, 2e-4)), 3) == pytest.approx(2e-4, rel=1e-3)


def test_probed_every_nth_version():
    assert [v for v in range(5) if not math.isnan(probed(weights(probe_every=2), v))] == [0, 2, 4]
    assert math.isnan(probed(weights(probe_every=0), 0))


def test_engine_and_parameter_are_named():
    with pytest.raises(RunError, match=r"engine 1 disagrees .* version 4: .* is 'norm'"):
        probed(weights((0.0, 0.1)), 4)


def test_the_threshold_that_is_set_decides():
    probed(weights((0.0, 1e-4), probe_threshold=1e-2), 1)
    with pytest.raises(RunError, match="disagrees"):
        probed(weights((0.0, 1e-4), probe_threshold=1e-5), 1)


def test_prefixes_of_older_weights_are_found_where_weights_change_under_requests():
    asked = []

    def found(tokens: np.ndarray) -> dict[int, float]:
        asked.append(tokens)
        return {0: 1e-5, 1: 0.03}

    made = weights()
    made._engines.cache_gaps = found  # type: ignore[attr-defined]
    probed(made, 1)
    assert not asked  # nobody's cache is older than the weights
    made._under_way = 40
    with pytest.raises(RunError, match=r"engine 1 draws after prefixes that other weights than those of version 2"):
        probed(made, 2)
    assert asked[0].tolist() == np.resize(TOKENS, 40).tolist()


def test_a_probe_without_engines_measures_nothing():
    assert math.isnan(probed(weights(()), 0))


class Fleet:
    """Engines of which some go in a push."""

    def __init__(self, *deaths: int) -> None:
        self.there = [0, 1, 2]
        self.deaths = list(deaths)
        self.told: list[tuple[list[int], int]] = []

    def awaiting_weights(self) -> list[int]:
        return list(self.there)

    def any_lost(self, engines) -> bool:
        return any(i not in self.there for i in engines)

    def pushed(self, engines, version) -> None:
        self.told.append((list(engines), version))


class Ranks:
    def __init__(self, fleet: Fleet, error: type[RunError] = EngineLostError) -> None:
        self.fleet = fleet
        self.error = error
        self.pushes: list[list[int]] = []
        self.idle = True

    @contextlib.contextmanager
    def free(self):
        yield self.idle

    def push(self, version, engines, sums="none"):
        self.pushes.append(list(engines))
        if self.fleet.deaths:
            gone = self.fleet.deaths.pop(0)
            if gone >= 0:
                self.fleet.there.remove(gone)
            raise self.error("trainer rank 0: engine: it is gone")
        return {"sums": sums}


def pusher(fleet: Fleet, ranks: Ranks) -> Weights:
    return Weights(SyncConfig(), "float32", ranks, fleet, lambda: TOKENS)  # pyright: ignore


def test_a_push_in_which_engines_are_lost_is_done_again_with_the_others():
    fleet = Fleet(1, 2)
    ranks = Ranks(fleet)
    pusher(fleet, ranks).push(4)
    assert ranks.pushes == [[0, 1, 2], [0, 2], [0]]
    assert fleet.told == [([0], 4)]


@pytest.mark.parametrize("error", [RunError, EngineLostError])
def test_a_push_that_fails_though_all_engines_live_ends_the_run(error):
    fleet = Fleet(-1)
    with pytest.raises(error, match="it is gone"):
        pusher(fleet, Ranks(fleet, error)).push(4)
    assert fleet.told == []


def test_lost_ranks_are_not_asked_again():
    fleet = Fleet(1)
    ranks = Ranks(fleet, RanksLostError)
    with pytest.raises(RanksLostError):
        pusher(fleet, ranks).push(4)
    assert len(ranks.pushes) == 1


def test_an_engine_that_comes_back_alone_gets_the_weights_of_now():
    fleet = Fleet()
    ranks = Ranks(fleet)
    made = pusher(fleet, ranks)
    made.push(7)
    fleet.renew([1])  # pyright: ignore
    assert ranks.pushes == [[0, 1, 2], [1]]
    assert fleet.told == [([0, 1, 2], 7), ([1], 7)]
    ranks.idle = False  # or with the weights of the next version
    fleet.renew([1])  # pyright: ignore
    assert len(ranks.pushes) == 2
    ranks.idle, fleet.deaths = True, [1]
    fleet.renew([1])  # pyright: ignore
    assert fleet.told[2:] == []


def joining(transport: str) -> tuple[TrainerGroup, list[str], SimpleNamespace]:
    """Ranks that only note whom they join; the engines."""
    said: list[str] = []
    group = TrainerGroup.__new__(TrainerGroup)
    engines = SimpleNamespace(actors=["a", "b", "c"])

    def connect(named, *_):
        said.append("".join(named.values()))

    rank = SimpleNamespace(connect=SimpleNamespace(remote=connect))
    group._transport, group._engines, group._actors, group._joined = transport, engines, [rank], {}
    group._address, group._timeout = ("", 0), 1.0
    group._together = lambda *_: [[]]  # pyright: ignore
    return group, said, engines


@pytest.mark.parametrize(
    ("transport", "joins"),
    [
        # A group of whole pushes is of those who are pushed to; in shards each engine joins once.
        ("gloo", ["abc", "b", "abc", "abC", "ab"]),
        ("sharded", ["abc", "C"]),
    ],
)
def test_who_joins_when(transport, joins):
    group, said, engines = joining(transport)
    group.join([0, 1, 2])
    group.join([0, 1, 2])
    group.join([1])
    group.join([0, 1, 2])
    engines.actors[2] = "C"  # started again
    group.join([0, 1, 2])
    group.join([0, 1])
    assert said == joins
