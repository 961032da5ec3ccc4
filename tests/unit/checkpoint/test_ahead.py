"""The batch that a checkpoint keeps comes back bit for bit, and damage is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from stare_megatron.checkpoint import Ahead, Outstanding, read_ahead
from stare_megatron.checkpoint import ahead as stored
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import UserError
from stare_megatron.types import (
    Call,
    EpisodeCounts,
    Group,
    GroupRequest,
    Measured,
    Prompt,
    Sampling,
    Score,
    Span,
    SpanKind,
    Status,
    Trajectory,
    Turn,
)

NONE = np.zeros(0, np.float32)


def batch() -> Ahead:
    prompt = Prompt("p-1", "sums", "1 + é =", (5, 6), "7", {"level": 3, "tags": ["a", None], "x": 0.1})
    action = Span(SpanKind.ACTION, np.array([7, 2], np.int32), np.array([-0.1, -1e-30], np.float32))
    spans = (
        Span(SpanKind.PROMPT, np.array([5, 6], np.int32), NONE),
        action,
        Span(SpanKind.OBSERVATION, np.zeros(0, np.int32), NONE),
    )
    turns = (Turn((Call("python", "print(1)", "ok", 0.25),), void=False),)
    experts = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    groups = (
        Group(
            prompt,
            (
                Trajectory("p-1", 0, spans, Status.COMPLETED, (3, 4), 2**62 + 1, turns, experts),
                Trajectory("p-1", 1, spans[:2], Status.UNGRADED, (4, 4), 9),
            ),
            (
                Score(1 / 3, True, "right", measured=(Measured("reward/x", 0.1, 3),)),
                Score(0.0, False, "", graded=False),
            ),
        ),
    )
    summary = groups[0].summary((2, 0))
    other = dataclasses.replace(summary, prompt_id="dropped", episodes=(EpisodeCounts(1, 2, 0, 0.5, 3, void=True),))
    measured = (
        Measured("reward/mean", 0.1 + 0.2, 2),
        Measured("groups/dropped", 1),
        Measured("sync/probe", float("nan")),
    )
    return Ahead(groups, (summary,), (summary, other), measured, 1.25, StreamState(1, 7, 11, "print"))


def same(a: Any, b: Any) -> None:
    """Equal in every field, type and bit."""
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            same(vars(a)[field.name], vars(b)[field.name])
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for mine, theirs in zip(a, b, strict=True):
            same(mine, theirs)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert repr(a) == repr(b)


def test_a_batch_comes_back_bit_for_bit(tmp_path):
    stored.write(tmp_path, batch())
    same(read_ahead(tmp_path), batch())


def test_requests_come_back(tmp_path):
    """Those of groups that are in no batch yet."""
    prompt = Prompt("p-1", "sums", "1 +", (5, 6), "7", {"level": 3})
    sampling = Sampling(16, 1.0, 0.9, ("\n", "é"), 2**62 + 1)
    kept = Outstanding((GroupRequest(4, prompt, 8, sampling),), StreamState(1, 7, 11, "print"))
    stored.write(tmp_path, kept)
    same(read_ahead(tmp_path), kept)


def test_no_batch_is_no_error_and_damage_is_told(tmp_path):
    assert read_ahead(tmp_path) is None
    stored.write(tmp_path, batch())
    file = tmp_path / stored.FILE
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a zip file", whole.replace(b'"seconds"', b'"minutes"')):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"ahead\.npz: not what a checkpoint keeps"):
            read_ahead(tmp_path)
