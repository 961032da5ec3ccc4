"""Sampled trajectories to read: the text files of `metrics/samples.py`, taken apart for the report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.metrics.samples import FOLDER

_HEAD = re.compile(r"^=== (?P<prompt>.*) sample (?P<sample>\d+): reward (?P<reward>\S+), (?P<rest>.*)$")


@dataclass(frozen=True)
class Part:
    """One span: `label` is prompt, response, observation, answer or note."""

    label: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One trajectory: `facts` is what the file says beside the reward, e.g. "correct, completed, 16 action tokens"."""

    prompt: str
    sample: int
    reward: float
    facts: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class SampledStep:
    step: int
    samples: tuple[Sample, ...]


def read_samples(folder: Path, files: int) -> list[SampledStep]:
    """At most `files` of a run's steps with samples, evenly picked, the first and the last among them.

    Raises:
        UserError: a file that is not one of samples.
    """
    found = sorted((folder / FOLDER).glob("step_*.txt"))
    return [_read(file) for file in _pick(found, files)]


def _pick(files: Sequence[Path], count: int) -> list[Path]:
    if count <= 0:
        return []
    if len(files) <= count:
        return list(files)
    if count == 1:
        return [files[-1]]
    return [files[round(i * (len(files) - 1) / (count - 1))] for i in range(count)]


def _read(file: Path) -> SampledStep:
    try:
        lines = file.read_text().splitlines()
        step = int(file.stem.removeprefix("step_"))
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: not a file of samples ({e}); remove it, or use --samples 0") from e
    samples: list[Sample] = []
    block: list[str] = []
    for line in [*lines[1:], None]:
        if line is None or _HEAD.match(line):
            if block:
                samples.append(_sample(block))
            block = []
        if line is not None and (block or _HEAD.match(line)):
            block.append(line)
    return SampledStep(step, tuple(samples))


def _sample(block: Sequence[str]) -> Sample:
    head = _HEAD.match(block[0])
    assert head is not None
    parts: list[tuple[str, list[str]]] = []
    for line in block[1:]:
        if re.fullmatch(r"--- (prompt|response|observation|answer|note)", line):
            parts.append((line[4:], []))
        elif parts:
            parts[-1][1].append(line)
    return Sample(
        head["prompt"],
        int(head["sample"]),
        float(head["reward"]),
        head["rest"],
        tuple(Part(label, "\n".join(text).strip("\n")) for label, text in parts),
    )
