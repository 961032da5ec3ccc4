"""Sampled trajectories as data, for the viewer of the report: `samples/step_000010.jsonl`, one trajectory a line.

docs/comparing_runs.md says what a line holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stare_megatron.host.files import write_atomic
from stare_megatron.metrics.samples import Decode, Picked
from stare_megatron.types import SpanKind
from stare_megatron.types.token_record import TokenRecord

# Tokens decoded again before the new ones: some tokenizers write a token differently at the beginning of a text.
_CONTEXT = 4
# Tokens that together make no readable text before the search for their boundaries ends.
_PATIENCE = 32


def pieces(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token, such that they join to `decode(token_ids)`.

    A token that ends inside a character has the text up to there, often none; the token that completes the character
    has it. Where boundaries cannot be found (a decoder that rewrites what came before) the last token has the rest.
    """
    ids, whole = list(token_ids), decode(list(token_ids))
    found, at, anchor = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = ""
        if end - anchor <= _PATIENCE:
            begin = max(0, anchor - _CONTEXT)
            before, after = decode(ids[begin:anchor]), decode(ids[begin:end])
            new = after[len(before) :]
            # An unfinished character decodes to U+FFFD, which the whole text has there only if it is never finished.
            if after.startswith(before) and whole.startswith(new, at):
                text, anchor = new, end
        found.append(text)
        at += len(text)
    if found:
        found[-1] += whole[at:]
    return found


def write_sample_records(
    folder: Path, step: int, picked: Sequence[Picked], records: Mapping[tuple[int, int], TokenRecord], decode: Decode
) -> Path:
    """Write the trajectories, one a line; returns the file, which is replaced whole.

    `records`: what the trainer knew of those it was trained on, by `Picked.place`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_line(step, p, records.get(p.place), decode), ensure_ascii=False) + "\n" for p in picked]
    file = folder / f"step_{step:06d}.jsonl"
    write_atomic(file, "".join(lines))
    return file


def _line(step: int, picked: Picked, record: TokenRecord | None, decode: Decode) -> dict[str, Any]:
    trajectory, score = picked.trajectory, picked.score
    spans, at = [], 0
    for span in trajectory.spans:
        ids = span.token_ids.tolist()
        here = slice(at, at + len(ids))
        at += len(ids)
        made: dict[str, Any] = {"kind": span.kind.value, "token_ids": ids, "pieces": pieces(ids, decode)}
        if span.kind is SpanKind.ACTION:
            made["rollout_logprobs"] = _numbers(span.logprobs)
            made["policy_versions"] = [list(run) for run in span.versions]
            if record is not None:
                made |= {
                    "logprobs": _numbers(record.logprob[here]),
                    "raw_logprobs": _numbers(record.raw_logprob[here]),
                    "entropies": _numbers(record.entropy[here]),
                    "weights": _numbers(record.weight[here]),
                    "selection": record.selection[here].tolist(),
                }
        spans.append(made)
    trained = [] if record is None else _numbers(record.advantage[record.known])
    return {
        "step": step,
        "prompt_id": trajectory.prompt_id,
        "source": picked.group.prompt.source,
        "sample": trajectory.sample,
        "reward": score.reward,
        "correct": score.correct,
        "status": trajectory.status.value,
        "note": score.note,
        "measured": {part.name: _number(part.value) for part in score.measured},
        "answer": picked.group.prompt.answer,
        "policy_version": trajectory.weight_versions[0],
        "seed": trajectory.seed,
        "advantage": trained[0] if trained else None,
        "turns": [
            {
                "void": turn.void,
                "calls": [
                    {"tool": c.tool, "code": c.code, "outcome": c.outcome, "seconds": round(c.seconds, 6)}
                    for c in turn.calls
                ],
            }
            for turn in trajectory.turns
        ],
        "spans": spans,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(values: Iterable[Any]) -> list[float | None]:
    """Float32 values with as few digits as tell them apart; None where one is not finite, which JSON cannot say."""
    return [float(str(x)) if math.isfinite(x) else None for x in values]
