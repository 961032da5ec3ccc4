"""Sampled trajectories as text to read: `samples/step_000010.txt`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stare_megatron.types import Group, Score, SpanKind, Trajectory

FOLDER = "samples"

Decode = Callable[[list[int]], str]


def write_samples(folder: Path, step: int, groups: Sequence[Group], decode: Decode, limit: int) -> Path:
    """Write at most `limit` trajectories, of as many groups as possible: first the best of each group, then the worst.

    `decode` turns token ids into text. Returns the file, which is replaced whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picked = list(_pick(groups))[:limit]
    text = f"step {step}: {len(picked)} of {sum(len(g.trajectories) for g in groups)} trajectories\n"
    for group, trajectory, score in picked:
        text += "\n" + _format(group, trajectory, score, decode)
    file = folder / f"step_{step:06d}.txt"
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)
    return file


def _pick(groups: Sequence[Group]) -> Iterator[tuple[Group, Trajectory, Score]]:
    ranked = [
        sorted(zip(g.trajectories, g.scores, strict=True), key=lambda pair: (-pair[1].reward, pair[0].sample))
        for g in groups
    ]
    for group, pairs in zip(groups, ranked, strict=True):
        yield group, *pairs[0]
    for group, pairs in zip(groups, ranked, strict=True):
        if len(pairs) > 1:
            yield group, *pairs[-1]
    for group, pairs in zip(groups, ranked, strict=True):
        for pair in pairs[1:-1]:
            yield group, *pair


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
