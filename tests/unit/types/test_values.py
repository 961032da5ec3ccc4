"""What one part hands to the next: what its values count, and what they refuse to be."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from stare_megatron.types import (
    Call,
    EpisodeCounts,
    Group,
    GroupSummary,
    Prompt,
    Score,
    SequenceCost,
    Span,
    SpanKind,
    Status,
    Trajectory,
    Turn,
)
from stare_megatron.types.measured import Measured, Measurements, mean

NONE = np.zeros(0, np.float32)
PROMPT = Prompt("p", "sums", "1 + 1", (5, 6), "2")


def span(kind: SpanKind, *ids: int, versions: tuple[tuple[int, int], ...] = ()) -> Span:
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) if kind is SpanKind.ACTION else NONE
    return Span(kind, np.array(ids, np.int32), logprobs, versions)


def trajectory(*more: Span, turns: tuple[Turn, ...] = (), status: Status = Status.COMPLETED) -> Trajectory:
    return Trajectory("p", 0, (span(SpanKind.PROMPT, 5, 6), *more), status, (3, 4), 7, turns)


FIRST, SECOND = span(SpanKind.ACTION, 1, 2, versions=((3, 1), (4, 1))), span(SpanKind.ACTION, 8)
SEEN = span(SpanKind.OBSERVATION, 9, 9, 9)
TURNS = (Turn((Call("python", "1", "ok", 0.5), Call("python", "", "malformed", 0.25)), void=False), Turn((), void=True))


def test_a_trajectory_tells_its_tokens_apart() -> None:
    made = trajectory(FIRST, SEEN, SECOND, turns=TURNS)
    assert (made.num_tokens, made.num_action_tokens) == (8, 3)
    assert made.token_ids().tolist() == [5, 6, 1, 2, 9, 9, 9, 8]
    assert made.action_mask().tolist() == [False, False, True, True, False, False, False, True]
    assert made.rollout_logprobs().tolist() == [0, 0, -1, -2, 0, 0, 0, -1]
    # A span that does not tell was drawn by the oldest policy.
    assert made.version_runs() == ((3, 1), (4, 1), (3, 1))
    assert made.versions().tolist() == [-1, -1, 3, 4, -1, -1, -1, 3]
    assert made.counts() == EpisodeCounts(
        turns=2, calls=2, call_errors=1, tool_seconds=0.75, observation_tokens=3, void=True
    )


def test_turns_of_one_policy_are_one_stretch() -> None:
    before = [span(SpanKind.ACTION, 1, 2, versions=((3, 2),)), SEEN]
    assert trajectory(*before, span(SpanKind.ACTION, 8, versions=((3, 1),))).version_runs() == ((3, 3),)
    last = span(SpanKind.ACTION, 8, 9, versions=((3, 1), (4, 1)))
    made = trajectory(*before, last, SEEN, span(SpanKind.ACTION, versions=((5, 0),)))
    assert made.version_runs() == ((3, 3), (4, 1))
    assert made.versions().tolist() == [-1, -1, 3, 3, *[-1] * 3, 3, 4, *[-1] * 3]


@pytest.mark.parametrize(
    ("ids", "logprobs", "kind", "versions", "says"),
    [
        (np.array([1], np.int64), NONE, SpanKind.PROMPT, (), "must be int32"),
        (np.array([[1]], np.int32), NONE, SpanKind.PROMPT, (), "must be int32"),
        (np.array([1], np.int32), np.zeros(1), SpanKind.ACTION, (), "must be float32"),
        (np.array([1], np.int32), NONE, SpanKind.ACTION, (), "1 tokens has 0 logprobs"),
        (np.array([1], np.int32), np.zeros(1, np.float32), SpanKind.OBSERVATION, (), "1 tokens has 1 logprobs"),
        (np.array([1], np.int32), np.zeros(1, np.float32), SpanKind.ACTION, ((3, 2),), "has versions"),
    ],
)
def test_a_span_of_another_form_is_refused(ids, logprobs, kind, versions, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Span(kind, ids, logprobs, versions)


def test_a_trajectory_begins_with_its_prompt() -> None:
    with pytest.raises(ValueError, match="must begin with its prompt span"):
        Trajectory("p", 0, (FIRST,), Status.COMPLETED, (3, 3), 7)


def test_a_group_s_summary_counts_distinct_right_answers_by_their_tokens() -> None:
    twice, other = trajectory(FIRST), trajectory(SECOND)
    right, wrong = Score(1.0, True, "", measured=(Measured("reward/part/math", 1.0),)), Score(0.0, False, "")
    made = Group(PROMPT, (twice, twice, other, other), (right, right, right, wrong)).summary((0, 2, 1, 0))
    assert made.distinct_correct == 2
    assert made.rewards == (1.0, 1.0, 1.0, 0.0)
    assert made.num_action_tokens == (2, 2, 1, 1)
    assert made.reflections == (0, 2, 1, 0)
    assert len(made.measured) == 3
    assert made.version_runs()[0] == ((3, 1), (4, 1))
    assert dataclasses.replace(made, versions=()).version_runs()[0] == ((3, 2),)
    with pytest.raises(ValueError, match="2 trajectories and 1 scores"):
        Group(PROMPT, (twice, other), (right,))


@pytest.mark.parametrize(
    ("rewards", "statuses", "nothing"),
    [
        ((1.0, 0.0), (Status.COMPLETED, Status.COMPLETED), False),
        ((1.0, 1.0), (Status.COMPLETED, Status.COMPLETED), True),
        ((1.0, 0.0), (Status.COMPLETED, Status.FAILED), True),  # one is left, which teaches nothing
        ((1.0, 0.0, 1.0), (Status.COMPLETED, Status.FAILED, Status.COMPLETED), True),
    ],
)
def test_groups_that_teach_nothing(rewards, statuses, nothing: bool) -> None:
    count = len(rewards)
    made = Group(
        PROMPT,
        tuple(trajectory(SECOND, status=status) for status in statuses),
        tuple(Score(reward, reward > 0, "") for reward in rewards),
    ).summary()
    assert isinstance(made, GroupSummary)
    assert len(made.rewards) == count
    assert made.zero_variance is nothing


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_is_finite(reward: float) -> None:
    with pytest.raises(ValueError, match="reward must be finite"):
        Score(reward, False, "")


def test_measurements_are_found_by_name() -> None:
    made = Measurements((mean("reward/mean", [1.0, 0.0, 0.5]), Measured("time/step", 3.0, 0)))
    assert made["reward/mean"] == 0.5
    assert math.isnan(made["time/step"])
    with pytest.raises(KeyError, match="update/loss"):
        made["update/loss"]


def test_the_cost_of_a_sequence_has_attention_s_square() -> None:
    assert SequenceCost(linear=3.0, quadratic=2.0)(10) == 230.0
