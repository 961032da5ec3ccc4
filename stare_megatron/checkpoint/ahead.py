"""What was sampled, or ordered, ahead of a checkpoint: `ahead.npz`.

A run that samples while it trains has a batch in hand when it saves, drawn by the policy before the saved one. It is
kept rather than drawn again: that would take the older policy's weights too, and engines repeat samples bit for bit
only where their kernels do not depend on what else is in a batch, which those of GPUs do.

Where groups are sampled all the time, those that are in no batch yet are kept as requests, with what there is of their
samples, so that every prompt is learned from once; those that are finished are in the bank (`bank.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stare_megatron.checkpoint import typed
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import UserError
from stare_megatron.types import Group, GroupRequest, GroupSummary, Measured

FILE = "ahead.npz"


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A whole update batch that nobody has learned from.

    `groups` with the summary of each; `sampled`: of all groups sampled for it; `measured` of them; `seconds` that it
    took; `after`: where the prompts stand after it.
    """

    groups: tuple[Group, ...]
    summaries: tuple[GroupSummary, ...]
    sampled: tuple[GroupSummary, ...]
    measured: tuple[Measured, ...]
    seconds: float
    after: StreamState


@dataclasses.dataclass(frozen=True)
class Outstanding:
    """Requests of groups that nobody has learned from, in the order they were made; `after`: where the prompts stand
    after them. `since`: of each, the version that it was begun with, by which it grows old. `bank`: name of the shelf
    that holds those of them that are finished, "" for none."""

    requests: tuple[GroupRequest, ...]
    after: StreamState
    since: tuple[int, ...] = ()
    bank: str = ""


_KINDS = {kind.__name__: kind for kind in (Ahead, Outstanding)}


def write(folder: Path, kept: Ahead | Outstanding) -> None:
    """Write `ahead.npz`; it is on disk on return.

    Raises:
        OSError: it cannot be written.
    """
    typed.write(folder / FILE, kept)


def read(folder: Path) -> Ahead | Outstanding | None:
    """What a checkpoint folder keeps, bit for bit; None where nothing was sampled ahead.

    Raises:
        UserError: the file is damaged or of another version.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        return typed.read(file, _KINDS)
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: not what a checkpoint keeps: {e}") from e
