"""Sampled trajectories of runs, from the files of `metrics/sample_records.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError
from stare_megatron.metrics.samples import FOLDER

_KINDS = ("prompt", "action", "observation")
# Key of a span in the file -> numbers of its tokens; all but the first are the trainer's.
COLUMNS = ("rollout_logprobs", "logprobs", "raw_logprobs", "entropies", "weights", "selection")


@dataclass(frozen=True)
class SampledSpan:
    """`kind`: prompt, action or observation; `pieces`: text of each token; `columns`: of `COLUMNS` those the file has,
    one value a token, None: not finite; `versions`: of the policies that drew the tokens, if the file has them."""

    kind: str
    pieces: tuple[str, ...]
    token_ids: tuple[int, ...]
    columns: Mapping[str, tuple[float | None, ...]]
    versions: tuple[int, ...]


@dataclass(frozen=True)
class SampledCall:
    tool: str
    outcome: str
    seconds: float


@dataclass(frozen=True)
class SampledTurn:
    calls: tuple[SampledCall, ...]
    void: bool


@dataclass(frozen=True)
class Sample:
    """One trajectory: `facts` is what the file says beside the reward, e.g. "correct, completed, 16 action tokens";
    `advantage`: None where it was not trained on."""

    prompt: str
    sample: int
    reward: float
    facts: str
    answer: str
    note: str
    advantage: float | None
    turns: tuple[SampledTurn, ...]
    spans: tuple[SampledSpan, ...]


@dataclass(frozen=True)
class SampledStep:
    step: int
    samples: tuple[Sample, ...]


def read_samples(folder: Path, files: int) -> list[SampledStep]:
    """At most `files` of a run's steps with samples, evenly picked, the first and the last among them.

    Raises:
        UserError: a file that is not one of samples.
    """
    found = sorted((folder / FOLDER).glob("step_*.jsonl"))
    if 1 < files < len(found):
        found = [found[round(i * (len(found) - 1) / (files - 1))] for i in range(files)]
    return [_read(file) for file in (found[-files:] if files else [])]


def _read(file: Path) -> SampledStep:
    try:
        text = file.read_text(encoding="utf-8")
        step = int(file.stem.removeprefix("step_"))
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: not a file of samples ({e}); remove it, or use --samples 0") from e
    # Not splitlines: JSON texts may hold other line breaks.
    lines = text.removesuffix("\n").split("\n") if text else []
    return SampledStep(step, tuple(_record(file, number, line) for number, line in enumerate(lines, 1)))


def _record(file: Path, number: int, line: str) -> Sample:
    try:
        record: dict[str, Any] = json.loads(line)
        spans = tuple(_span(span) for span in record["spans"])
        turns = tuple(
            SampledTurn(tuple(SampledCall(c["tool"], c["outcome"], c["seconds"]) for c in turn["calls"]), turn["void"])
            for turn in record["turns"]
        )
        actions = sum(len(span.token_ids) for span in spans if span.kind == "action")
        versions = sorted({version for span in spans for version in span.versions}) or [record["policy_version"]]
        drawn = f"s {versions[0]} to {versions[-1]}" if versions[1:] else f" {versions[0]}"
        facts = (
            f"{'correct' if record['correct'] else 'wrong'}, {record['status']}, {actions} action tokens, "
            f"policy version{drawn}, seed {record['seed']}"
        )
        return Sample(
            prompt=record["prompt_id"],
            sample=record["sample"],
            reward=record["reward"],
            facts=facts,
            answer=record["answer"],
            note=record["note"],
            advantage=record["advantage"],
            turns=turns,
            spans=spans,
        )
    except KeyError as e:
        raise UserError(f"{file}:{number}: key {e} is missing in a sample; remove the file, or use --samples 0") from e
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}:{number}: not a sample ({e}); remove the file, or use --samples 0") from e


def _span(span: Mapping[str, Any]) -> SampledSpan:
    kind, pieces, ids = span["kind"], tuple(span["pieces"]), tuple(span["token_ids"])
    columns = {name: tuple(span[name]) for name in COLUMNS if name in span}
    if kind not in _KINDS:
        raise ValueError(f"kind {kind!r}")
    versions = tuple(v for version, count in span.get("policy_versions", ()) for v in [int(version)] * int(count))
    lists = {"pieces": pieces, **columns} | ({"policy_versions": versions} if versions else {})
    wrong = [name for name, values in lists.items() if len(values) != len(ids)]
    if wrong:
        raise ValueError(f"{wrong[0]}: not one value for each of {len(ids)} token_ids")
    return SampledSpan(kind, pieces, ids, columns, versions)
