"""The probe after a push: when, on what, and whom it names. What it finds: tests/unit/sync/test_probe_faults.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from stare_megatron.cluster.trainers import TrainerGroup
from stare_megatron.config import SyncConfig
from stare_megatron.errors import RunError
from stare_megatron.run.weights import Weights

TOKENS = np.array([3, 9, 4], np.int32)
OURS = np.array([-1.0, -2.0], np.float32)


def weights(gaps=(0.0, 0.0), **sync) -> Weights:
    def asked(tokens):
        assert tokens is TOKENS
        return OURS

    trainers = SimpleNamespace(score_tokens=asked, checksums=lambda: {"embed": "1", "norm": "2"})
    engines = SimpleNamespace(
        logprobs=lambda tokens: [OURS + np.float32(gap) for gap in gaps],
        checksums=lambda *_: [{"embed": "1", "norm": "2"}, {"embed": "1", "norm": "3"}],
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

    def found(tokens: np.ndarray) -> list[float]:
        asked.append(tokens)
        return [1e-5, 0.03]

    made = weights()
    made._engines.cache_gaps = found  # type: ignore[attr-defined]
    probed(made, 1)
    assert not asked  # nobody's cache is older than the weights
    made._under_way = 40
    with pytest.raises(RunError, match=r"engine 1 draws after prefixes that other weights than those of version 2"):
        probed(made, 2)
    assert asked[0].tolist() == np.resize(TOKENS, 40).tolist()


def test_a_late_engine_joins_and_alone_gets_the_weights():
    calls = []
    trainers = SimpleNamespace(
        join=lambda engines: calls.append(("join", engines)),
        push=lambda version, **given: calls.append(("push", version, given)),
    )
    Weights(SyncConfig(), "float32", trainers, SimpleNamespace(), lambda: TOKENS).admit(1, 7)
    assert calls == [("join", [1]), ("push", 7, {"engines": [1]})]


def test_an_engine_cannot_join_alone_where_whole_tensors_are_sent():
    group = TrainerGroup.__new__(TrainerGroup)
    group._transport, group._engines = "gloo", SimpleNamespace(actors=["one", "other"])
    with pytest.raises(RunError, match=r"engine 1 cannot join alone where whole tensors are sent \(sync\.method\)"):
        group.join([1])
