"""Groups in parts, and what is expected of responses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stare_megatron.cluster.lengths import Lengths
from stare_megatron.cluster.parts import Order, joined, spread, whole
from stare_megatron.types import (
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
)

PROMPT = Prompt("p", "s", "q", (4, 5, 6), "7")
REQUEST = GroupRequest(3, PROMPT, 7, Sampling(8, 1.0, 1.0, (), 5))


def trajectory(sample: int) -> Trajectory:
    """Samples 1 and 4 say the same."""
    n = sample % 3 + 1
    spans = (
        Span(SpanKind.PROMPT, np.asarray(PROMPT.token_ids, np.int32), np.zeros(0, np.float32)),
        Span(SpanKind.ACTION, np.full(n, 9, np.int32), np.full(n, -0.5, np.float32), ((2, n),)),
    )
    return Trajectory(PROMPT.id, sample, spans, Status.COMPLETED, (2, 2), seed=sample)


@pytest.mark.parametrize("engines", [1, 2, 3, 7, 9])
def test_parts_have_every_sample_once_and_are_as_even_as_can_be(engines: int) -> None:
    parts = spread(whole(REQUEST), engines)
    assert [n for part in parts for n in part.samples] == list(range(7))
    assert len(parts) == min(engines, 7)
    sizes = [len(part.samples) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert {id(part.spread) for part in parts} == {id(parts[0].spread)}
    assert not any(part.joins for part in parts)
    assert Order(REQUEST, (), parts[0].spread).joins


@pytest.mark.parametrize("engines", [1, 2, 4])
def test_joined_parts_are_the_group(engines: int) -> None:
    """Also where a number is of the whole: distinct correct responses, and the sums of what a reward reports."""
    scores = [Score(n / 7, n in (1, 4, 5), "", measured=(Measured("reward/mean", 0.1 * n),)) for n in range(7)]
    group = Group(PROMPT, tuple(map(trajectory, range(7))), tuple(scores))
    words = tuple(range(7))
    parts = [
        Group(PROMPT, tuple(group.trajectories[n] for n in o.samples), tuple(group.scores[n] for n in o.samples))
        for o in spread(whole(REQUEST), engines)
    ]
    found, summary = joined(words, tuple(parts))
    assert found.trajectories == group.trajectories
    assert found.scores == group.scores
    assert summary == group.summary(words)
    assert summary.distinct_correct == 2


def test_a_prompt_is_expected_to_be_as_long_as_it_was() -> None:
    lengths = Lengths()
    other, elsewhere = dataclasses.replace(PROMPT, id="o"), dataclasses.replace(PROMPT, id="e", source="t")
    assert lengths.expected(PROMPT) == 0
    lengths.saw(PROMPT, (100, 300))
    assert lengths.expected(PROMPT) == lengths.expected(other) == lengths.expected(elsewhere) == 200
    lengths.saw(dataclasses.replace(elsewhere, id="f"), (800,))
    assert lengths.expected(elsewhere) == 800
    assert lengths.expected(other) == 200
    lengths.saw(PROMPT, (400,))
    assert lengths.expected(PROMPT) == 300  # halfway to the newest
    assert 200 < lengths.expected(other) < 300
