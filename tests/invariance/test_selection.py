"""Exact selection and vocab-parallel log-probs over real process groups (gloo)."""

import pytest
import torch
from group_cases import tokens
from launch import launch

from stare_megatron.algo.reduce import fixed_point_sum
from stare_megatron.algo.selection import hash32, top_count

KINDS = ["random", "ties", "equal", "nan", "infinite", "zeros", "empty subset", "one token"]
N = 20_000
OFFSETS = [0.0, 300.0, -300.0, 1e4, -1e4]


def oracle(kind: str, n: int, fraction: float) -> torch.Tensor:
    """Ids by sorts of the whole batch in one process: by hash of the id, then (stably) by surprisal."""
    surprisal, subset, ids = tokens(kind, n)
    chosen = []
    for code in (0, 1):
        own = ((subset == code) & ~surprisal.isnan()).nonzero()[:, 0]
        own = own[hash32(ids[own]).argsort(descending=True)]
        own = own[(surprisal[own] + 0.0).argsort(descending=True, stable=True)]
        chosen.append(ids[own[: int(top_count(fraction, torch.tensor(len(own))))]])
    return torch.cat(chosen).sort().values


def check(kind: str, n: int, fraction: float, results: list) -> None:
    seen = [r[kind] for r in results]
    assert torch.equal(torch.cat([s["ids"] for s in seen]).sort().values, oracle(kind, n, fraction)), kind
    assert all(s["counts"] == seen[0]["counts"] for s in seen)
    assert all(s["traffic"] == (6, 6 * 8 * 4097) for s in seen)  # six all-reduces of 33 KB, however many tokens
    surprisal, subset, _ = tokens(kind, n)
    assert seen[0]["counts"][2] == int((surprisal.isnan() & (subset != 2)).sum())
    assert all(s["entropy"] == fixed_point_sum(surprisal).tolist() for s in seen)
    calls, size = seen[0]["traffic"]
    print(f"{kind}, {n} tokens on {len(seen)} ranks: {size} bytes a rank in {calls} all-reduces")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_selection_on_ranks_matches_a_sort(ranks):
    results = launch("group_cases:selection", ranks, {"kinds": KINDS, "n": N, "fraction": 0.1})
    for kind in KINDS:
        check(kind, N, 0.1, results)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ten_million_tokens(ranks):
    kinds = ["random", "ties"]
    results = launch("group_cases:selection", ranks, {"kinds": kinds, "n": 10_000_000, "fraction": 0.1})
    for kind in kinds:
        check(kind, 10_000_000, 0.1, results)


def _assert_exact(results: list) -> None:
    for errors in results:
        assert list(errors) == OFFSETS
        for offset, error in errors.items():
            assert error["same"] == 0, offset
            for name in ("logprob", "entropy", "sensitivity", "gradient"):
                assert error[name] < 2e-6, (offset, name)


@pytest.mark.parametrize(("ranks", "temperature"), [(1, 1.0), (2, 1.0), (4, 0.7)])
def test_vocab_parallel_logprobs(ranks, temperature):
    """At a real vocabulary, against float64: half of it masked to -inf in every second row, offsets, padding that would
    win."""
    arguments = {"vocab": 151_936, "rows": 6, "temperature": temperature, "offsets": OFFSETS}
    _assert_exact(launch("group_cases:logprobs", ranks, arguments))


def test_vocab_parallel_logprobs_of_the_triton_kernels(monkeypatch):
    """Under the interpreter; the third rank holds 88 columns and padding, the fourth nothing but padding."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = {"vocab": 600, "rows": 4, "temperature": 0.7, "offsets": OFFSETS}
    _assert_exact(launch("group_cases:logprobs", 4, arguments))
