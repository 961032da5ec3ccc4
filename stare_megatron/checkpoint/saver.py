"""When and how a run saves: room on the disk, one save at a time, in the background or not, and what is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from stare_megatron.checkpoint import store
from stare_megatron.checkpoint.ahead import Ahead, Outstanding
from stare_megatron.checkpoint.settings import Settings
from stare_megatron.checkpoint.state import LoopState
from stare_megatron.config import CheckpointConfig
from stare_megatron.errors import ORDINARY, RunError, UserError
from stare_megatron.host import manifest
from stare_megatron.host.files import free_bytes

# The next checkpoint may be somewhat larger, and metrics and logs go to the same disk.
_MARGIN = 1.05


class RankWriters(Protocol):
    """All trainer ranks, which write the largest part of a checkpoint."""

    def held_step(self) -> int | None:
        """The step whose weights all ranks have; None in the middle of an update. Returns soon.

        Raises:
            RunError: a rank is gone or does not answer.
        """
        ...

    def begin_save(self, folder: Path, step: int) -> None:
        """Start to write into `folder`; returns when the state may change again."""
        ...

    def save_written(self) -> bool:
        """Whether every rank's part is written, so that `finish_save` need not wait."""
        ...

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        """Wait for the end of what `begin_save` started; entries of the files, by path relative to its folder."""
        ...


class Saver:
    """Saves a run's checkpoints under `root`.

    Args:
        estimate: bytes of a checkpoint, as long as none is there to look at.
        values: of `checkpoint.best_metric`, by step, as far as the run has come.
        warn: shows the user a line.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        settings: Settings,
        writers: RankWriters,
        *,
        estimate: int,
        values: Callable[[], Mapping[int, float]],
        warn: Callable[[str], None],
    ) -> None:
        self._root = root
        self._config = config
        self._settings = settings
        self._writers = writers
        self._estimate = estimate
        self._values = values
        self._warn = warn
        self._pending: int | None = None

    def save(self, state: LoopState, ahead: Ahead | Outstanding | None = None) -> bool:
        """Save, with what was sampled ahead, if anything was, after the save before has ended. With
        `checkpoint.asynchronous` the ranks write on afterwards.

        A save that the disk has no room for is left out with a warning, if there is an older checkpoint; then False.

        Raises:
            RunError: no room and no older checkpoint, or a file cannot be written.
        """
        self.wait()
        store.sweep(self._root)
        if not self._room(state.step):
            return False
        try:
            partial = store.begin(self._root, state, self._settings, ahead)
        except OSError as e:
            raise RunError(f"{self._root}: cannot save step {state.step}: {e}") from e
        self._writers.begin_save(partial / store.TRAINER, state.step)
        self._pending = state.step
        if not self._config.asynchronous:
            self.wait()
        return True

    @property
    def pending(self) -> bool:
        """Whether a save is being written."""
        return self._pending is not None

    def rescue(self, state: LoopState, ahead: Ahead | Outstanding | None = None) -> None:
        """Finish a save under way, and save the state unless it is saved already; does not return before all is on
        disk. A failure is only told, for the run has another error."""
        try:
            if self._is_saved(state.step) and not self.pending:
                return
            held = self._writers.held_step()  # first: who waits for a rank that is gone waits long
            self.wait()
            if self._is_saved(state.step):
                return
            if held != state.step:
                raise RunError("the update after it has changed weights already")
            if self.save(state, ahead):
                self.wait()
                self._warn(f"step {state.step} is saved: started again, the run goes on from there")
        except (RunError, UserError, *ORDINARY) as e:
            self.give_up(state.step, str(e).partition("\n")[0])

    def give_up(self, step: int, why: str) -> None:
        """Say that a step is not saved, if it is not."""
        if not self._is_saved(step):
            self._warn(f"step {step} is not saved: {why}")

    def _is_saved(self, step: int) -> bool:
        return step in map(store.step_of, store.complete(self._root))

    def poll(self) -> None:
        """Finish a save that is written; does not wait for one."""
        if self._pending is not None and self._writers.save_written():
            self.wait()

    def wait(self) -> None:
        """Finish the save under way, if any.

        Raises:
            RunError: it cannot be written; checkpoints before it are untouched.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        with contextlib.ExitStack() as stack:
            stack.callback(store.sweep, self._root)
            entries = self._writers.finish_save()
            try:
                store.finish(self._root, step, {f"{store.TRAINER}/{name}": e for name, e in entries.items()})
                store.prune(self._root, self._config, self._values() if self._config.best_metric else {})
            except OSError as e:
                raise RunError(f"{self._root}: cannot save step {step}: {e}") from e

    def _room(self, step: int) -> bool:
        older = store.complete(self._root)
        size = store.size(older[-1]) if older else self._estimate
        need = int(size * _MARGIN)
        free = free_bytes(self._root)
        if free >= need:
            return True
        text = (
            f"{self._root}: no room to save step {step}: {free / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB needed; free "
            "some or lower checkpoint.keep_last"
        )
        if not older:
            raise RunError(text)
        self._warn(f"{text}; the newest checkpoint stays {older[-1].name}")
        return False
