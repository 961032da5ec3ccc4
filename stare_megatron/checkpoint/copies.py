"""Durable copies of local checkpoints: made beside training, one at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from stare_megatron.checkpoint import store
from stare_megatron.checkpoint.local import NodeDisks, linked
from stare_megatron.checkpoint.store import LOCAL, PLACE
from stare_megatron.errors import RunError
from stare_megatron.host import manifest
from stare_megatron.host.node_disk import copy

_LOOK_S = 0.2


class Copies:
    """Copies checkpoints of `checkpoints/local` into `root`, which is `checkpoints/`: written under a temporary name,
    sealed with a manifest and renamed, as a save there is.

    Args:
        room: whether there is room for so many bytes of a step; says so where there is not.
        sealed: called with the step of each when it is on disk.
        warn: shows the user a line.
    """

    def __init__(
        self,
        root: Path,
        disks: NodeDisks,
        room: Callable[[int, int], bool],
        sealed: Callable[[int], None],
        warn: Callable[[str], None],
    ) -> None:
        self._root = root
        self._disks = disks
        self._room = room
        self._sealed = sealed
        self._warn = warn
        self._now: int | None = None
        self._next: int | None = None

    @property
    def steps(self) -> list[int]:
        """Those that are being copied, or will be."""
        return [step for step in (self._now, self._next) if step is not None]

    def want(self, step: int) -> None:
        """Copy a local checkpoint when the one before is copied, unless a newer one is wanted by then.

        Raises:
            RunError: it cannot be begun.
        """
        if self._now is None:
            self._begin(step)
            return
        if self._next is not None:
            self._warn(
                f"step {self._next} is not copied to {self._root}: steps are saved faster than they are copied; raise "
                "checkpoint.every or checkpoint.durable_every"
            )
        self._next = step

    def poll(self) -> None:
        """Seal a copy that is done, and begin the next; does not wait."""
        if self._now is not None and self._disks.copied():
            self._finish(self._now)

    def wait(self) -> None:
        """Finish all that are wanted.

        Raises:
            RunError: one cannot be written, or read; checkpoints before it are untouched.
        """
        while self._now is not None:
            self.poll()
            if self._now is not None:
                time.sleep(_LOOK_S)

    def _begin(self, step: int) -> None:
        store.sweep(self._root)
        source = self._source(step)
        entries = manifest.read(source) or {}
        if not self._room(step, sum(entry.bytes for entry in entries.values())):
            return
        partial = store.partial_of(self._root, step)
        try:
            (partial / store.TRAINER).mkdir(parents=True)
            for name in entries.keys() - linked(source).keys() - {PLACE}:
                copy(source / name, partial / name, entries[name])
        except OSError as e:
            raise self._error(step, e) from e
        self._disks.begin_copy(source, partial)
        self._now = step

    def _finish(self, step: int) -> None:
        following, self._now, self._next = self._next, None, None
        with contextlib.ExitStack() as stack:
            stack.callback(store.sweep, self._root)
            self._disks.finish_copy()
            try:
                store.finish(self._root, step, linked(self._source(step)))
                self._sealed(step)
            except OSError as e:
                raise self._error(step, e) from e
        if following is not None:
            self._begin(following)

    def _source(self, step: int) -> Path:
        return self._root / LOCAL / store.folder_name(step)

    def _error(self, step: int, error: OSError) -> RunError:
        return RunError(f"{self._root}: cannot copy step {step} there: {error}")
