"""Finished groups that a checkpoint names and nobody has learned from: `bank/step_000040-1f0c2a7e/SEED.npz`.

Where groups are sampled all the time, a checkpoint names those that are outstanding, and has a shelf of its own in the
bank. The groups that are finished by then are put there, and those that are finished later as long as only policies up
to the checkpoint's have drawn them: later ones are lost with the process that made them. What is not on the shelf is
sampled again, so nothing depends on the bank. A group is known by the seed of its request, which no other one of the
checkpoint has.

Shelves stay until a newer checkpoint is on disk. A name is never used again, so that a shelf belongs to one checkpoint,
whatever else has been saved at its step.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.checkpoint import typed
from stare_megatron.host.files import PARTIAL, sync_folder
from stare_megatron.types import Group, GroupSummary


@dataclass(frozen=True)
class Banked:
    """A finished group; `seed`: its request's."""

    seed: int
    group: Group
    summary: GroupSummary


def shelf_name(step: int) -> str:
    """A name for the shelf of a checkpoint of a step."""
    return f"step_{step:06d}-{secrets.token_hex(4)}"


class Bank:
    """Raises OSError where something cannot be written. `root`: the folder `bank/` of a run, made when it is needed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, shelf: str, banked: Banked) -> None:
        """On disk on return: whole, or not at all."""
        path = self._path(shelf, banked.seed)
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            sync_folder(self._root)
        partial = path.with_name(path.name + PARTIAL)
        typed.write(partial, banked)
        os.replace(partial, path)
        sync_folder(path.parent)

    def has(self, shelf: str, seed: int) -> bool:
        """Whether something is there, be it damaged."""
        return bool(shelf) and self._path(shelf, seed).exists()

    def take(self, shelf: str, seed: int) -> Banked:
        """What was put there.

        Raises:
            OSError: it cannot be read. ValueError: it is damaged, or of another version.
        """
        found = typed.read(self._path(shelf, seed), {Banked.__name__: Banked})
        if found.seed != seed:
            raise ValueError(f"it is of seed {found.seed}")
        return found

    def clear(self, keep: set[str]) -> None:
        """Remove all shelves but these."""
        for folder in self._root.glob("step_*-*"):
            if folder.name not in keep and re.fullmatch(r"step_\d+-[0-9a-f]+", folder.name):
                shutil.rmtree(folder)

    def _path(self, shelf: str, seed: int) -> Path:
        return self._root / shelf / f"{seed}.npz"
