"""Packing into rows: alignment of targets, holes, padding, context-parallel slices, empty rows."""

import itertools

import numpy as np
import pytest
import torch

from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.config import AlgorithmConfig
from stare_megatron.config.float8 import BLOCKS
from stare_megatron.trainer.partials import NO_TARGET
from stare_megatron.trainer.sequence import (
    MicroBatch,
    SequenceLayout,
    dummy,
    micro_batches,
    padded_lengths,
    probe,
    token_batch,
)
from stare_megatron.types import (
    Assignment,
    Group,
    Prompt,
    Score,
    Span,
    SpanKind,
    Status,
    TokenBatch,
    Trajectory,
    UpdateShare,
)

CPU = torch.device("cpu")
ALONE = SequenceLayout(sequence_parallel=1, context_parallel=1, context_rank=0)
NONE = np.empty(0, np.float32)


def trajectory(sample: int, *spans: tuple[SpanKind, list[int]]) -> Trajectory:
    made = [
        Span(k, np.array(t, np.int32), -np.array(t, np.float32) if k is SpanKind.ACTION else NONE) for k, t in spans
    ]
    return Trajectory("p", sample, tuple(made), Status.COMPLETED, (0, 0), 0)


def group() -> Group:
    prompt = (SpanKind.PROMPT, [1, 2, 3])
    return Group(
        Prompt("p", "s", "", (1, 2, 3), ""),
        (
            trajectory(0, prompt, (SpanKind.ACTION, [10, 11])),
            trajectory(1, prompt, (SpanKind.ACTION, [20]), (SpanKind.OBSERVATION, [4, 5]), (SpanKind.ACTION, [21, 22])),
            trajectory(2, prompt, (SpanKind.ACTION, [30, 31, 32])),
        ),
        (Score(1.0, True, ""), Score(0.0, False, ""), Score(0.0, False, "")),
    )


def batch_of(share: UpdateShare) -> TokenBatch:
    return token_batch([group()], share, ALGORITHMS["grpo"], AlgorithmConfig(), CPU)


def share_of(*samples: int, rows: int = 1) -> UpdateShare:
    """Sequence n goes to row n, the last row takes what is left."""
    first = {0: 0, 1: 5, 2: 13}
    packed = tuple(tuple(n for n in range(len(samples)) if min(n, rows - 1) == row) for row in range(rows))
    return UpdateShare((Assignment(0, samples, tuple(first[s] for s in samples)),), 8, 3, packed, 0.0, 8)


def test_token_batch():
    batch = batch_of(share_of(1, 2))
    assert batch.token_ids_T.tolist() == [1, 2, 3, 20, 4, 5, 21, 22, 1, 2, 3, 30, 31, 32]
    assert batch.action_T.nonzero()[:, 0].tolist() == [3, 6, 7, 11, 12, 13]
    assert batch.rollout_logprob_T[[3, 4, 13]].tolist() == [-20.0, 0.0, -32.0]
    assert batch.global_id_T.tolist() == list(range(5, 19))
    assert batch.sequence_T.tolist() == [0] * 8 + [1] * 6
    assert batch.cu_seqlens_N1.tolist() == [0, 8, 14]
    # From the rewards (1, 0, 0) of the whole group, though the first trajectory is on another rank.
    assert batch.advantage_T[batch.action_T].tolist() == pytest.approx([-1 / 3 / (3**-0.5 + 1e-6)] * 6)
    assert batch.advantage_T[~batch.action_T].eq(0).all()
    assert (batch.num_action_tokens, batch.num_sequences) == (8, 3)


def predictions(batch: TokenBatch, rows: list[MicroBatch]) -> dict[int, tuple[int, int]]:
    """Target's place in the batch -> (token the row shows at that position, target)."""
    found: dict[int, tuple[int, int]] = {}
    for row in rows:
        for token, target, source in zip(
            row.token_ids_1P[0].tolist(), row.target_P.tolist(), row.source_P.tolist(), strict=True
        ):
            assert (source == -1) == (target == NO_TARGET)
            if source >= 0:
                assert source not in found
                found[source] = (token, target)
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_every_action_token_is_predicted_once_from_the_token_before(rows, tensor, context):
    share = share_of(0, 1, 2, rows=rows)
    batch = batch_of(share)
    by_rank = [
        micro_batches(batch, share, SequenceLayout(tensor, context, context_rank)) for context_rank in range(context)
    ]
    found = predictions(batch, [row for own in by_rank for row in own])
    assert sorted(found) == batch.action_T.nonzero()[:, 0].tolist()
    for place, (token, target) in found.items():
        assert token == batch.token_ids_T[place - 1]
        assert target == batch.token_ids_T[place]
    for own in by_rank:
        assert len(own) == rows
        for row in own:
            local = row.token_ids_1P.shape[1]
            assert local > 0
            assert local % tensor == 0
            assert int(row.cu_seqlens_M1[-1]) == local * context
            lengths = [b - a for a, b in itertools.pairwise(row.cu_seqlens_M1.tolist())]
            assert max(lengths) == row.max_seqlen
            if context > 1:
                assert all(n % (2 * context) == 0 for n in lengths)


def test_packing_alone_pads_nothing():
    share = share_of(0, 1, 2)
    (row,) = micro_batches(batch_of(share), share, ALONE)
    assert row.cu_seqlens_M1.tolist() == [0, 5, 13, 19]
    assert row.position_ids_1P[0].tolist() == [*range(5), *range(8), *range(6)]


def test_zigzag():
    """Rank r of 2 holds chunks r and 3 - r of each sequence."""
    ids = torch.arange(100, 108)
    assert [probe(ids, SequenceLayout(1, 2, r)).token_ids_1P[0].tolist() for r in (0, 1)] == [
        [100, 101, 106, 107],
        [102, 103, 104, 105],
    ]


def test_a_share_without_sequences_makes_dummy_rows():
    share = UpdateShare((), 8, 3, ((), ()), 0.0, 8)
    batch = batch_of(share)
    assert batch.token_ids_T.shape == (0,)
    for layout in (ALONE, SequenceLayout(4, 1, 0), SequenceLayout(2, 2, 1)):
        rows = micro_batches(batch, share, layout)
        assert len(rows) == 2
        assert all(row.target_P.eq(NO_TARGET).all() for row in [*rows, dummy(layout, CPU)])
        assert all(row.token_ids_1P.shape[1] % layout.sequence_parallel == 0 for row in rows)


@pytest.mark.parametrize("share", [UpdateShare((), 8, 3, ((), ()), 0.0, 8), share_of(1, 2)], ids=["none", "some"])
def test_tokens_are_on_the_ranks_device(share):
    """Without sequences too: a model on a GPU takes no tensor of a CPU."""
    batch = token_batch([group()], share, ALGORITHMS["grpo"], AlgorithmConfig(), torch.device("meta"))
    tensors = {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    assert {name for name, x in tensors.items() if x.is_meta} == {name for name in tensors if name.endswith("_T")}


def test_padding_is_the_least_that_serves():
    assert padded_lengths([5, 3], ALONE) == [5, 3]
    assert padded_lengths([5, 3], SequenceLayout(4, 1, 0)) == [5, 3]
    assert padded_lengths([5, 4], SequenceLayout(4, 1, 0)) == [5, 7]
    assert padded_lengths([5, 3], SequenceLayout(1, 2, 0)) == [8, 4]
    assert padded_lengths([], SequenceLayout(2, 2, 0)) == [4]


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (4, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("block", BLOCKS.values())
def test_a_rank_has_whole_blocks_of_float8(tensor: int, context: int, block: int) -> None:
    layout = SequenceLayout(tensor, context, 0, block)
    for lengths in ([], [5, 3], [300, 129, 1]):
        padded = padded_lengths(lengths, layout)
        assert sum(padded) % (block * tensor * context) == 0
        assert len(padded) == max(1, len(lengths))
        alone = padded_lengths(lengths, SequenceLayout(tensor, context, 0))
        assert padded[:-1] == alone[:-1]
        assert 0 <= padded[-1] - alone[-1] < block * tensor * context
