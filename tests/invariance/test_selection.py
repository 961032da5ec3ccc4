"""Exact selection and vocab-parallel log-probs over real process groups (gloo)."""

import pytest
import torch
from group_cases import tokens
from launch import launch

from stare_megatron.algo.reduce import fixed_point_sum
from stare_megatron.algo.selection import hash32, top_count

KINDS = ["random", "ties", "equal", "nan", "zeros"]
N = 20_000


def oracle(kind: str, fraction: float) -> list[int]:
    """A sort of the whole batch by (surprisal, hash of id)."""
    surprisal, subset, ids = tokens(kind, N)
    hashes = hash32(ids)
    chosen: list[int] = []
    for code in (0, 1):
        rows = ((subset == code) & ~surprisal.isnan()).nonzero()[:, 0].tolist()
        rows.sort(key=lambda i: (float(surprisal[i]) + 0.0, int(hashes[i])), reverse=True)
        chosen += ids[rows[: int(top_count(fraction, torch.tensor(len(rows))))]].tolist()
    return sorted(chosen)


@pytest.mark.parametrize("ranks", [2, 3])
def test_selection_on_ranks_matches_a_sort(ranks):
    results = launch("group_cases:selection", ranks, {"kinds": KINDS, "n": N, "fraction": 0.1}, timeout=120)
    for kind in KINDS:
        seen = [r[kind] for r in results]
        assert sorted(i for s in seen for i in s["ids"]) == oracle(kind, 0.1), kind
        assert all(s["counts"] == seen[0]["counts"] for s in seen)
        assert all(s["traffic"] == (6, 6 * 8 * 4097) for s in seen)  # six all-reduces of 33 KB
        surprisal, subset, _ = tokens(kind, N)
        assert seen[0]["counts"][2] == int((surprisal.isnan() & (subset != 2)).sum())
        assert all(s["entropy"] == fixed_point_sum(surprisal).tolist() for s in seen)


@pytest.mark.parametrize(("ranks", "temperature"), [(2, 1.0), (4, 0.7)])
def test_vocab_parallel_logprobs(ranks, temperature):
    """Half of the vocabulary masked to -inf in every second row, an offset of 300, padding that would win."""
    arguments = {"vocab": 151_936 if ranks == 2 else 1000, "rows": 8, "temperature": temperature}
    for error in launch("group_cases:logprobs", ranks, arguments, timeout=120):
        assert error["logprob"] < 2e-6
        assert error["entropy"] < 2e-6
        assert error["same"] == 0
        assert error["gradient"] < 2e-6
