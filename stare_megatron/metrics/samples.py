"""Sampled trajectories: which are kept, and as text to read: `samples/step_000010.txt`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.host.files import write_atomic
from stare_megatron.types import Group, Score, SpanKind, Trajectory

FOLDER = "samples"

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, eq=False)
class Picked:
    """A trajectory to be shown. `place`: its group among the groups of the batch, and its place in the group."""

    place: tuple[int, int]
    group: Group
    trajectory: Trajectory
    score: Score


def pick(groups: Sequence[Group], limit: int) -> list[Picked]:
    """At most `limit` trajectories, of as many groups as possible: first the best of each group, then the worst."""
    ranked = [_ranked(place, group) for place, group in enumerate(groups)]
    best = [own[0] for own in ranked]
    worst = [own[-1] for own in ranked if len(own) > 1]
    return [*best, *worst, *(p for own in ranked for p in own[1:-1])][:limit]


def _ranked(place: int, group: Group) -> list[Picked]:
    pairs = enumerate(zip(group.trajectories, group.scores, strict=True))
    own = [Picked((place, i), group, trajectory, score) for i, (trajectory, score) in pairs]
    return sorted(own, key=lambda p: (-p.score.reward, p.trajectory.sample))


def write_samples(folder: Path, step: int, picked: Sequence[Picked], total: int, decode: Decode) -> Path:
    """Write the trajectories picked of `total`. `decode` turns token ids into text.

    Returns the file, which is replaced whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = f"step {step}: {len(picked)} of {total} trajectories\n"
    for p in picked:
        text += "\n" + _format(p.group, p.trajectory, p.score, decode)
    file = folder / f"step_{step:06d}.txt"
    write_atomic(file, text)
    return file


def _format(group: Group, trajectory: Trajectory, score: Score, decode: Decode) -> str:
    head = (
        f"=== {trajectory.prompt_id} sample {trajectory.sample}: reward {score.reward:g}, "
        f"{'correct' if score.correct else 'wrong'}, {trajectory.status.value}, "
        f"{trajectory.num_action_tokens} action tokens, policy version {trajectory.weight_version}, "
        f"seed {trajectory.seed}\n"
    )
    body = "".join(f"--- {_LABEL[span.kind]}\n{decode(span.token_ids.tolist())}\n" for span in trajectory.spans)
    note = f"--- note\n{score.note}\n" if score.note else ""
    return f"{head}{body}--- answer\n{group.prompt.answer}\n{note}"


_LABEL = {SpanKind.PROMPT: "prompt", SpanKind.ACTION: "response", SpanKind.OBSERVATION: "observation"}
