"""Weights that change while the KV cache is kept: what an older version computed serves nobody who comes later."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from stare_megatron.errors import RunError
from stare_megatron.sync.check import BOUNDS, require_own_cache
from stare_megatron.types import Sampling
from tests.e2e.test_weight_push import PROMPT, SAMPLING, Trainer, start, stop, weights
from tests.e2e.tiny_qwen2 import make_model, reference_logprobs, save

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """An engine that keeps KV caches across pushes."""
    model = make_model(tied=True, seed=0)
    engines = start(save(model, tmp_path_factory.mktemp("keeping")), 1)
    try:
        engines[0].call("__setattr__", "keeps_kv", True)
        yield Trainer(engines, 1, weights(model))
    finally:
        stop(engines)


def test_a_request_looks_for_prefixes_of_its_own_version(keeping: Trainer) -> None:
    """Without that the log-probs are wrong, and only a token drawn after a prefix tells."""
    engine = keeping.engines[0]
    keeping.push(weights(make_model(True, seed=1)))
    assert engine.call("cache_gap", PROMPT) < BOUNDS["float32"]
    engine.call("sample", PROMPT, SAMPLING)
    model = make_model(True, seed=2)
    version = keeping.push(weights(model))
    for _ in range(2):  # the second time from the cache
        gap = engine.call("cache_gap", PROMPT)
        require_own_cache("engine 0", version, gap, BOUNDS["float32"])
        completion = engine.call("sample", PROMPT, SAMPLING)
        expected = reference_logprobs(model, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    # As it would be without a salt: the engine looks by the update before.
    engine.call("__setattr__", "updates", 1)
    np.testing.assert_allclose(engine.call("logprobs", PROMPT), reference_logprobs(model, PROMPT), atol=1e-4)
    gap = engine.call("cache_gap", PROMPT)
    with pytest.raises(RunError, match="draws after prefixes that other weights"):
        require_own_cache("engine 0", version, gap, BOUNDS["float32"])
    engine.call("__setattr__", "updates", 2)


def test_a_version_that_comes_again_is_another_one(keeping: Trainer) -> None:
    """Ranks that went back to a checkpoint make it anew, of other samples: the first one computed nothing for it."""
    engine = keeping.engines[0]
    keeping.versions = itertools.repeat(9)
    keeping.push(weights(make_model(True, seed=3)))
    engine.call("cache_gap", PROMPT)
    engine.call("sample", PROMPT, SAMPLING)
    model = make_model(True, seed=4)
    version = keeping.push(weights(model))
    require_own_cache("engine 0", version, engine.call("cache_gap", PROMPT), BOUNDS["float32"])
    completion = engine.call("sample", PROMPT, SAMPLING)
    assert completion.versions == ((9, len(completion.token_ids)),)
    expected = reference_logprobs(model, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    keeping.versions = itertools.count(10)


@pytest.mark.parametrize("keep", [True, False])
def test_a_sequence_tells_which_version_drew_each_token(keeping: Trainer, keep: bool) -> None:
    """Spans end where a push went through; the tokens of the newest have its log-probs where the KV cache is anew."""
    engine = keeping.engines[0]
    engine.call("__setattr__", "keeps_kv", keep)
    old, new = make_model(True, seed=5), make_model(True, seed=6)
    before = keeping.push(weights(old))
    order = Sampling(max_tokens=150, temperature=1.0, top_p=1.0, stop=(), seed=0)
    flying = [engine.submit("sample", PROMPT, order) for _ in range(40)]
    after = keeping.push(weights(new))
    completions = [f.result(200) for f in flying]
    assert all(sum(n for _, n in c.versions) == len(c.token_ids) for c in completions)
    assert {version for c in completions for version, _ in c.versions} <= {before, after}
    c = max(completions, key=lambda c: len(c.token_ids))
    assert c.versions[0][0] == c.weight_version
    (_, first), *rest = c.versions
    here = slice(len(PROMPT) - 1, None)
    if c.weight_version == before:
        of_old = reference_logprobs(old, [*PROMPT, *c.token_ids])[here]
        np.testing.assert_allclose(c.logprobs[:first], of_old[:first], atol=1e-4)
    if rest and not keep:
        of_new = reference_logprobs(new, [*PROMPT, *c.token_ids])[here]
        np.testing.assert_allclose(c.logprobs[first:], of_new[first:], atol=1e-4)
