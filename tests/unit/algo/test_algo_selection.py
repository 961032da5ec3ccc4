"""Exact selection against a sort, in one process and over simulated ranks (threads with a barrier)."""

import math
import threading
from fractions import Fraction

import pytest
import torch

from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.selection import NEITHER, hash32, order_key, select_top, top_count


class ThreadShards:
    """Ranks as threads of one process: the same int64 sums as a process group, in milliseconds."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=300)
        self._slots: list[torch.Tensor] = [torch.empty(0)] * size
        self._rank = threading.local()

    def enter(self, rank: int) -> None:
        self._rank.value = rank

    def gather(self, x):
        self._slots[self._rank.value] = x.clone()
        self._barrier.wait()
        parts = list(self._slots)
        self._barrier.wait()
        return parts

    def sum(self, x):
        return x.copy_(torch.stack(self.gather(x)).sum(0))

    def max(self, x):
        return x.copy_(torch.stack(self.gather(x)).amax(0))


def on_ranks(size, body):
    comm, results, errors = ThreadShards(size), [None] * size, []

    def run(rank):
        comm.enter(rank)
        try:
            results[rank] = body(rank, comm)
        except BaseException as e:
            errors.append(e)
            comm._barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors
    return results


def oracle(value, subset, ids, fraction) -> set[int]:
    """Global ids chosen by a plain Python sort, k by exact rationals."""
    chosen: set[int] = set()
    hashes = hash32(ids).tolist()
    for code in (0, 1):
        rows = [
            (float(v) + 0.0, h, int(i))
            for v, s, h, i in zip(value, subset, hashes, ids, strict=True)
            if s == code and not math.isnan(v)
        ]
        k = math.ceil(Fraction(repr(fraction)) * len(rows))
        chosen |= {i for _, _, i in sorted(rows, reverse=True)[:k]}
    return chosen


def _inputs(kind: str, n: int = 400):
    g = torch.Generator().manual_seed(len(kind))
    value = -torch.log(torch.rand(n, generator=g))
    subset = torch.randint(0, 3, (n,), generator=g)
    if kind == "ties":
        value = value.mul(2).round() / 2
    elif kind == "equal":
        value = torch.full((n,), 0.25)
    elif kind == "nan":
        value[torch.rand(n, generator=g) < 0.3] = math.nan
    elif kind == "infinite":
        value[::3], value[1::5] = math.inf, -math.inf
    elif kind == "signed zeros":
        value = torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0)
    elif kind == "denormals":
        value = value * 1e-42
    elif kind == "negative":
        value = value - 2.0
    elif kind == "one subset":
        subset[:] = 1
    elif kind == "no subset":
        subset[:] = NEITHER
    elif kind == "one token":
        subset[:], subset[17] = NEITHER, 0
    ids = torch.randperm(1 << 20, generator=g)[:n]
    return value, subset, ids


KINDS = [
    "random", "ties", "equal", "nan", "infinite", "signed zeros", "denormals", "negative", "one subset", "no subset",
    "one token",
]  # fmt: skip


@pytest.mark.parametrize("fraction", [0.03, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_matches_a_sort(kind, fraction):
    value, subset, ids = _inputs(kind)
    got = select_top(value, subset, ids, fraction, OneRank())
    assert set(ids[got.selected_T].tolist()) == oracle(value, subset, ids, fraction)
    assert int(got.selected_S.sum()) == int(got.selected_T.sum())
    assert int(got.nan) == int((torch.isnan(value) & (subset != NEITHER)).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_sharding_chooses_the_same_tokens(kind, size):
    value, subset, ids = _inputs(kind)
    want = oracle(value, subset, ids, 0.1)
    uneven = [
        torch.arange(len(ids))[: 7 * r] if r == 0 else torch.arange(len(ids))[r - 1 :: size - 1] for r in range(size)
    ]
    dealt = [torch.arange(len(ids))[r::size] for r in range(size)]
    for rows in (dealt, uneven):  # in the second, rank 0 is empty

        def body(rank, comm, rows=rows):
            own = rows[rank]
            got = select_top(value[own], subset[own], ids[own], 0.1, comm)
            return set(ids[own][got.selected_T].tolist()), got.selected_S.tolist(), got.count_S.tolist(), int(got.nan)

        results = on_ranks(size, body)
        assert set().union(*(r[0] for r in results)) == want
        assert sum(results[0][1]) == len(want)
        assert all(r[1:] == results[0][1:] for r in results)


def test_zero_fraction_chooses_nothing():
    value, subset, ids = _inputs("random")
    assert not select_top(value, subset, ids, 0.0, OneRank()).selected_T.any()


def test_count_is_exact():
    n = torch.tensor([0, 1, 9, 10, 11, 300, 10**7])
    assert top_count(0.1, n).tolist() == [0, 1, 1, 1, 2, 30, 10**6]
    assert 0.07 * 100 > 7  # the floating-point trap
    assert top_count(0.07, torch.tensor([100, 101])).tolist() == [7, 8]
    assert top_count(1 / 3, torch.tensor([3, 300, 301])).tolist() == [1, 100, 101]


def test_keys_order_like_numbers():
    x = torch.tensor([-math.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 0.5, 1.0, 3e38, math.inf])
    keys = order_key(x).tolist()
    assert keys[4] == keys[5]
    del keys[4]
    assert keys == sorted(set(keys))


def test_ties_favour_no_position():
    """Among 4,096 equal surprisals the chosen tenth spreads over the sequence like a random tenth."""
    n = 4096
    got = select_top(torch.zeros(n), torch.zeros(n, dtype=torch.int64), torch.arange(n), 0.1, OneRank())
    per_eighth = got.selected_T.view(8, -1).sum(1)
    assert int(per_eighth.sum()) == 410
    assert int(per_eighth.min()) > 25
    assert int(per_eighth.max()) < 80


def test_hash_is_a_bijection_on_a_window():
    ids = torch.arange(0, 1 << 32, 4099)
    hashed = hash32(ids)
    assert hashed.unique().numel() == ids.numel()
    assert int(hashed.min()) >= 0
    assert int(hashed.max()) < 1 << 32


def test_nothing_is_read_back_to_the_host():
    """On the meta device values do not exist: an operator that waits for one, or whose shape depends on one, fails."""
    value, subset, ids = (x.to("meta") for x in _inputs("random"))
    got = select_top(value, subset, ids, 0.1, OneRank())
    assert got.selected_T.shape == value.shape
    with pytest.raises((RuntimeError, NotImplementedError)):  # the check sees a wait
        value[got.selected_T].sum()
