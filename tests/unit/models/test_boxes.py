"""Blocks of Hugging Face tensors, and which of them a rank holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stare_megatron.models.boxes import Box, Held, held
from stare_megatron.models.entries import ParameterEntry, entries, hf_names
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.layout import padded_vocab
from stare_megatron.models.shape import ModelShape, Split
from stare_megatron.models.shards import merge
from tests.invariance.checkpoints import FAMILIES, make


def test_what_two_boxes_share() -> None:
    one, other = Box("w", (0, 4), (6, 10)), Box("w", (4, 0), (9, 6))
    assert one.intersection(other) == Box("w", (4, 4), (6, 6)) == other.intersection(one)
    assert one.intersection(Box("v", (4, 0), (9, 6))) is None
    assert one.intersection(Box("w", (6, 0), (9, 10))) is None
    assert Box("w", (4, 4), (6, 6)).within(one) == (slice(4, 6), slice(0, 2))
    assert str(one) == "w[0:6, 4:10]"
    assert [str(b) for b in one.rows(13)] == ["w[0:2, 4:10]", "w[2:4, 4:10]", "w[4:6, 4:10]"]
    assert [str(b) for b in Box("b", (3,), (6,)).rows(2)] == ["b[3:5]", "b[5:6]"]


def shard(entry: ParameterEntry, shape: ModelShape, rank: int, size: int) -> torch.Tensor:
    """A rank's tensor with a number of its own in every element."""
    wants = entry.wants(shape)
    dims = list(wants[0])
    dims[0] = sum(want[0] for want in wants)
    if entry.tensor.layout is Split.VOCAB:
        dims[0] = padded_vocab(shape.vocab, size)
    if entry.tensor.layout is not Split.REPLICATED:
        axis = 1 if entry.tensor.layout in (Split.ROW, Split.EXPERT_ROW) else 0
        dims[axis] //= size
    count = torch.Size(dims).numel()
    own = 0 if entry.tensor.layout is Split.REPLICATED else rank * count
    return torch.arange(count, dtype=torch.int64).view(dims) + own


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_of_all_ranks_are_what_the_export_merges(family: str, size: int, tmp_path: Path) -> None:
    shape = read_hf_config(make(family, tmp_path))
    full = hf_names(shape)
    for entry in entries(shape):
        shards = [shard(entry, shape, rank, size) for rank in range(size)]
        for expert in range(entry.experts(shape)):
            whole = dict(zip(entry.names(expert), merge(entry.tensor, shards, shape), strict=True))
            seen = {name: torch.zeros(full[name], dtype=torch.int64) for name in whole}
            for rank, own in enumerate(shards):
                for part in held(entry, shape, expert, rank, size, own.shape[0]):
                    where = tuple(slice(b, e) for b, e in zip(part.box.begin, part.box.end, strict=True))
                    assert torch.equal(whole[part.box.name][where], own[part.where])
                    seen[part.box.name][where] += 1
            once = size if entry.tensor.layout is Split.REPLICATED else 1
            assert all((count == once).all() for count in seen.values())


def test_padding_is_nobodys(tmp_path: Path) -> None:
    shape = read_hf_config(make("qwen2", tmp_path))  # 112 words in 128 rows
    embedding = entries(shape)[0]
    assert list(held(embedding, shape, 0, 3, 4, 32)) == [
        Held(Box("model.embed_tokens.weight", (96, 0), (112, 128)), (0, 0))
    ]
    assert list(held(embedding, shape, 0, 7, 8, 16)) == []
