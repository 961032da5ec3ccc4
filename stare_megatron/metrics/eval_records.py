"""What an evaluation leaves on disk: `eval/step-N/`, written whole or not at all.

eval/step-000010/<benchmark>.jsonl   a line a prompt and setting: grades of all its responses, some of them to read
eval/step-000010/results.json        the numbers, whole and by source, and the fingerprint of the settings
eval.jsonl                           the metrics, a line an evaluation
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError
from stare_megatron.host.files import append_line, whole_folder
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.catalogue import Metric
from stare_megatron.metrics.eval_results import Result
from stare_megatron.types import Group, SpanKind

FOLDER = "eval"
TABLE = "eval.jsonl"
RESPONSES = "responses"  # the folder of `eval` on its own, apart, so that no benchmark's name can be that of the table
_RESULTS = "results.json"

Decode = Callable[[list[int]], str]


def response_row(group: Group, setting: str, limit: int, decode: Decode) -> dict[str, Any]:
    """One prompt under one setting (`sampled` or `greedy`), with the text of its first `limit` responses.

    Lists are indexed by sample; lengths in action tokens; `correct` is null where there is no grade.
    """
    graded = [s.graded for s in group.scores]
    return {
        "id": group.prompt.id,
        "source": group.prompt.source,
        "setting": setting,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "correct": [s.correct if known else None for s, known in zip(group.scores, graded, strict=True)],
        "reward": [s.reward if known else None for s, known in zip(group.scores, graded, strict=True)],
        "length": [t.num_action_tokens for t in group.trajectories],
        "status": [t.status.value for t in group.trajectories],
        "note": [s.note for s in group.scores],
        "responses": [
            decode([token for span in t.spans if span.kind is not SpanKind.PROMPT for token in span.token_ids.tolist()])
            for t in group.trajectories[:limit]
        ],
    }


def step_folder(root: Path, step: int) -> Path:
    """`root/step-N`."""
    return root / f"step-{step:06d}"


def fill(
    folder: Path, about: Mapping[str, Any], results: Sequence[Result], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Write the results, with what they are `about`, and a file of rows a benchmark into an existing folder."""
    for benchmark, lines in rows.items():
        with (folder / f"{benchmark}.jsonl").open("w", encoding="utf-8", errors="replace") as f:
            f.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    record = {**about, "results": [_tree(dataclasses.asdict(r)) for r in results]}
    (folder / _RESULTS).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def write(
    folder: Path,
    fingerprint: str,
    step: int,
    results: Sequence[Result],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Replace `folder` with one that holds the results and a file of rows a benchmark."""
    with whole_folder(folder) as partial:
        fill(partial, {"step": step, "fingerprint": fingerprint}, results, rows)


def append(run: Path, step: int, metrics: Sequence[Metric]) -> None:
    """Add an evaluation to the table of a run."""
    append_line(run / TABLE, jsonl.line(step, metrics))


def restore(run: Path, step: int, fingerprint: str) -> frozenset[int]:
    """Bring the record of a run to where it was at `step`; returns the steps whose evaluations are in it.

    Evaluations beyond `step` are cut, and one of `step` itself when it was made with other settings.

    Raises:
        UserError: a damaged table.
    """
    root, table = run / FOLDER, run / TABLE
    steps: frozenset[int] = frozenset()
    if table.exists():
        same = _fingerprint(step_folder(root, step)) == fingerprint
        jsonl.cut(table, step if same else step - 1)
        steps = frozenset(int(row["step"]) for row in jsonl.read(table))
    for folder in root.glob("step-*"):
        if folder.name not in {step_folder(root, kept).name for kept in steps}:
            shutil.rmtree(folder)
    return steps


def _fingerprint(folder: Path) -> str:
    """Of the settings an evaluation was made with; empty without one."""
    file = folder / _RESULTS
    try:
        return str(json.loads(file.read_text())["fingerprint"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not the results of an evaluation ({e}); remove {folder}") from e


def _tree(value: Any) -> Any:
    """With what JSON does not have as `metrics.jsonl` writes it."""
    if isinstance(value, dict):
        return {str(key): _tree(item) for key, item in value.items()}
    return jsonl.to_json(value) if isinstance(value, float) else value
