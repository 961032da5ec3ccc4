"""Sampled trajectories: which are kept, and as text to read: `samples/step_000010.txt`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stare_megatron.host.files import write_atomic
from stare_megatron.types import Group, GroupSummary, Score, SpanKind, Trajectory

FOLDER = "samples"

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, eq=False)
class Picked:
    """A trajectory to be shown. `place`: its group among the groups of the batch, and its place in the group."""

    place: tuple[int, int]
    group: Group
    trajectory: Trajectory
    score: Score


class SampleRow(NamedTuple):
    """A trajectory as a row of a table; `status` as in `samples/`."""

    prompt_id: str
    prompt: str
    response: str
    answer: str
    reward: float
    correct: bool
    status: str
    tokens: int


def table(picked: Sequence[Picked], decode: Decode) -> list[SampleRow]:
    """The trajectories as rows. `response`: all behind the prompt, what tools answered included."""
    rows = []
    for p in picked:
        ids = p.trajectory.token_ids().tolist()
        first = len(p.trajectory.spans[0].token_ids)
        score, trajectory = p.score, p.trajectory
        texts = decode(ids[:first]), decode(ids[first:]), p.group.prompt.answer
        about = score.reward, score.correct, trajectory.status.value, trajectory.num_action_tokens
        rows.append(SampleRow(trajectory.prompt_id, *texts, *about))
    return rows


def choose(groups: Sequence[GroupSummary], limit: int, step: int) -> list[tuple[int, int]]:
    """Places (`Picked.place`) of at most `limit` trajectories: the best of a group and the worst of another in turn.

    The groups come in an order that the step alone decides, for their best first those in which there is a success,
    for their worst those in which there is a failure; after all ends the rest.
    """
    order = random.Random(step).sample(range(len(groups)), len(groups))
    ranked = {g: sorted(range(len(groups[g].rewards)), key=lambda i: (-groups[g].rewards[i], i)) for g in order}
    low, high = min(min(g.rewards) for g in groups), max(max(g.rewards) for g in groups)
    best = sorted(order, key=lambda g: max(groups[g].rewards) == low)
    order.reverse()  # so that a group's best and its worst are far apart
    worst = sorted(order, key=lambda g: min(groups[g].rewards) == high)
    ends = (((b, ranked[b][0]), (w, ranked[w][-1])) for b, w in zip(best, worst, strict=True))
    places = dict.fromkeys(place for pair in ends for place in pair)
    return list(places | dict.fromkeys((g, i) for g in order for i in ranked[g]))[:limit]


def pick(groups: Mapping[int, Group], places: Sequence[tuple[int, int]]) -> list[Picked]:
    """The trajectories at `places`, of groups by their place in the batch."""
    return [Picked((g, i), groups[g], groups[g].trajectories[i], groups[g].scores[i]) for g, i in places]


def write_samples(
    folder: Path, step: int, picked: Sequence[Picked], trained: int, sampled: int, decode: Decode
) -> Path:
    """Write the trajectories picked of the `trained` ones of the update batch; `sampled` were sampled since the batch
    before, in a stream others than those, or none.

    `decode` turns token ids into text. Returns the file, which is replaced whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = (
        f"step {step}: {len(picked)} trajectories, the best and the worst of groups in turn, of the {trained} in the "
        f"update batch; {sampled} were sampled since the one before\n"
    )
    for p in picked:
        text += "\n" + _format(p.group, p.trajectory, p.score, decode)
    file = folder / f"step_{step:06d}.txt"
    write_atomic(file, text)
    return file


def _format(group: Group, trajectory: Trajectory, score: Score, decode: Decode) -> str:
    versions = " to ".join(map(str, dict.fromkeys(trajectory.weight_versions)))
    head = (
        f"=== {trajectory.prompt_id} sample {trajectory.sample}: reward {score.reward:g}, "
        f"{'correct' if score.correct else 'wrong'}, {trajectory.status.value}, "
        f"{trajectory.num_action_tokens} action tokens, policy version {versions}, "
        f"seed {trajectory.seed}\n"
    )
    body = "".join(f"--- {_LABEL[span.kind]}\n{decode(span.token_ids.tolist())}\n" for span in trajectory.spans)
    note = f"--- note\n{score.note}\n" if score.note else ""
    return f"{head}{body}--- answer\n{group.prompt.answer}\n{note}"


def excerpt(picked: Picked, decode: Decode, length: int = 240) -> str:
    """Prompt, response and reward of a trajectory in one line; of a long one the end."""
    text = " ".join(decode(picked.trajectory.token_ids().tolist()).split())
    short = text if len(text) <= length else f"...{text[-length:]}"
    return f"{picked.trajectory.prompt_id}, reward {picked.score.reward:g}: {short}"


_LABEL = {SpanKind.PROMPT: "prompt", SpanKind.ACTION: "response", SpanKind.OBSERVATION: "observation"}
