"""A range of a tensor's elements as blocks, and as pieces of what a checkpoint stores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron.trainer.shares import blocks, share
from tests.properties import bounded


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    ends = st.integers(0, math.prod(shape))
    start, stop = sorted((draw(ends), draw(ends)))
    return shape, start, stop


@bounded(100)
@given(ranges())
def test_blocks_are_the_range_in_its_order(case) -> None:
    shape, start, stop = case
    if not shape:
        return
    number = torch.arange(math.prod(shape)).view(shape)
    seen = []
    for block in blocks(shape, start, stop):
        where = tuple(slice(a, a + n) for a, n in zip(block.offsets, block.sizes, strict=True))
        elements = number[where].flatten().tolist()
        assert elements == list(range(block.first, block.first + math.prod(block.sizes)))
        seen += elements
    assert seen == list(range(start, stop))


@bounded(100)
@given(ranges())
def test_few_blocks(case) -> None:
    shape, start, stop = case
    assert len(list(blocks(shape, start, stop))) <= max(1, 2 * len(shape) - 1)


def pieces(parameter: torch.Tensor, ranks: list[tuple[int, int]], build: Any = None) -> torch.Tensor:
    """Layer 1 of 3 of what every rank's share makes together; -1 where nobody has an element."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    plain = ShardedTensor.from_rank_offsets("w", parameter, (0, 1, 3), replica_id=(0, 0, 3), prepend_axis_num=1)
    join: Any = torch.cat
    whole = plain if build is None else ShardedTensorFactory("w", parameter, build, join, (0, 0, 3))
    stored = torch.full((3, *parameter.shape), -1.0)
    for start, stop in ranks:
        values = parameter.flatten()[start:stop].clone()
        for piece in share(whole, "optimizer.state.param.", values, start):
            assert piece.key == "optimizer.state.param.w"
            assert piece.replica_id == (0, 0, 0)
            assert piece.data is not None
            assert piece.data.untyped_storage().data_ptr() == values.untyped_storage().data_ptr(), "a copy"
            where = tuple(slice(a, a + n) for a, n in zip(piece.global_offset, piece.local_shape, strict=True))
            assert torch.all(stored[where] == -1), "two ranks have the same element"
            stored[where] = piece.data
    assert torch.all(stored[[0, 2]] == -1)
    return stored[1]


RANKS = [(0, 5), (5, 17), (17, 17), (17, 24)]


def test_shares_of_all_ranks_are_the_parameter() -> None:
    parameter = torch.arange(24.0).view(6, 4)
    assert torch.equal(pieces(parameter, RANKS), parameter)


def test_a_parameter_that_is_stored_in_parts() -> None:
    """As gate and up projection are, which lie apart in the checkpoint as soon as tensors are split."""
    from megatron.core.dist_checkpointing import ShardedTensor

    def halves(key: str, whole: torch.Tensor, replica: Any, _: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(key, half, (0, 1, 3), (1, n, 2), replica_id=replica, prepend_axis_num=1)
            for n, half in enumerate(whole.chunk(2))
        ]

    parameter = torch.arange(24.0).view(6, 4)
    assert torch.equal(pieces(parameter, RANKS, halves), parameter)


def test_another_order_in_memory_is_refused() -> None:
    parameter = torch.arange(24.0).view(4, 6).t()
    with pytest.raises(RuntimeError, match="another order"):
        pieces(parameter, [(0, 24)])
