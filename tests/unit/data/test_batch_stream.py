"""Batches of supervised training: their order, their sizes, and going on in the middle."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stare_megatron.config import parse_sft
from stare_megatron.data.supervised import BatchStream, Counts, SequenceSet
from stare_megatron.errors import UserError

LENGTHS = (5, 3, 9, 2, 7, 4, 6, 8, 1, 3)


def sequences(fingerprint: str = "a") -> SequenceSet:
    total = sum(LENGTHS)
    ends = np.cumsum(LENGTHS, dtype=np.int64)
    counts = Counts(len(LENGTHS), 0, 0, 0)
    return SequenceSet(np.zeros(total, np.int32), np.ones(total, np.bool_), ends, counts, fingerprint)


def stream(fingerprint: str = "a", shuffle: bool = True, seed: int = 0, **sft: Any) -> BatchStream:
    tree = {"model": {"path": "m"}, "data": {"train": ["d.jsonl"], "shuffle": shuffle}, "run": {"seed": seed}}
    settings = {"epochs": 3, "max_tokens": 10} | sft
    return BatchStream(sequences(fingerprint), parse_sft(tree | {"sft": settings}, "test"))


def drawn(batches: BatchStream) -> list[list[int]]:
    return [batches.take() for _ in range(batches.remaining())]


def test_every_epoch_has_all_sequences_in_an_order_of_its_own() -> None:
    found = drawn(stream(batch_sequences=4))
    assert [len(batch) for batch in found] == [4, 4, 2] * 3
    epochs = [[*itertools.chain(*found[i : i + 3])] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert found == drawn(stream(batch_sequences=4))
    assert found != drawn(stream(batch_sequences=4, seed=1))


def test_without_shuffle_the_order_is_the_files() -> None:
    assert drawn(stream(batch_sequences=4, shuffle=False))[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_batches_by_tokens_are_as_full_as_they_can_be() -> None:
    batches = stream(batch_tokens=12)
    found = drawn(batches)
    sizes = [sum(LENGTHS[i] for i in batch) for batch in found]
    assert max(sizes) <= 12
    ends = {n for n, batch in enumerate(np.cumsum([len(b) for b in found])) if batch % 10 == 0}
    following = [LENGTHS[batch[0]] for batch in found[1:]]
    assert all(size + more > 12 for n, (size, more) in enumerate(zip(sizes, following, strict=False)) if n not in ends)
    assert sorted(itertools.chain(*found)) == sorted(list(range(10)) * 3)


@pytest.mark.parametrize("taken", range(9))
def test_a_restored_stream_goes_on_exactly(taken: int) -> None:
    one = stream(batch_sequences=4)
    for _ in range(taken):
        one.take()
    other = stream(batch_sequences=4, seed=5)  # the seed is the state's
    other.restore(one.state())
    assert other.remaining() == one.remaining() == 9 - taken
    assert other.epoch_is_over is one.epoch_is_over is (taken % 3 == 0 and taken > 0)
    assert drawn(other) == drawn(one)


def test_other_sequences_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.train: the conversations .* are not those of the checkpoint"):
        stream("b").restore(stream("a").state())
