"""When and how a run saves: room on the disk, one save at a time, in the background or not, and what is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from stare_megatron.checkpoint import store
from stare_megatron.checkpoint.ahead import Ahead, Outstanding
from stare_megatron.checkpoint.copies import Copies
from stare_megatron.checkpoint.local import MARGIN, Local, is_local, write_place
from stare_megatron.checkpoint.settings import Settings
from stare_megatron.checkpoint.state import LoopState
from stare_megatron.config import CheckpointConfig
from stare_megatron.errors import ORDINARY, RunError, UserError
from stare_megatron.host import manifest
from stare_megatron.host.files import free_bytes


class RankWriters(Protocol):
    """All trainer ranks, which write the largest part of a checkpoint."""

    def held_step(self) -> int | None:
        """The step whose weights all ranks have; None in the middle of an update. Returns soon.

        Raises:
            RunError: a rank is gone or does not answer.
        """
        ...

    def begin_save(self, folder: Path, step: int, local: Path | None = None) -> None:
        """Start to write into `folder`, or there as links to `local` on each rank's node; returns when the state may
        change again."""
        ...

    def save_written(self) -> bool:
        """Whether every rank's part is written, so that `finish_save` need not wait."""
        ...

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        """Wait for the end of what `begin_save` started; entries of the files, by path relative to its folder."""
        ...


class Saver:
    """Saves a run's checkpoints under `root`; with `local` most of them on the nodes' own disks, of which copies go to
    `root` meanwhile.

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
        local: Local | None = None,
    ) -> None:
        self._root = root
        self._config = config
        self._settings = settings
        self._writers = writers
        self._estimate = estimate
        self._values = values
        self._warn = warn
        self._local = local
        self._copies = local and Copies(root, local.disks, self._room_for_copy, self._sealed, warn)
        self._pending: tuple[Path, int] | None = None
        self.durable: Callable[[int], None] = lambda _: None
        """Is told of every step in `root` once it is on disk."""

    def save(
        self, state: LoopState, ahead: Ahead | Outstanding | None = None, *, last: bool = False, seal: bool = True
    ) -> bool:
        """Save, with what was sampled ahead, if anything was, after the save before has ended. With
        `checkpoint.asynchronous` the ranks write on afterwards. `last`: to `root` in any case. Without `seal` it counts
        only after `seal`, `poll`, `wait` or another save.

        A save that the disk has no room for is left out with a warning, if there is an older checkpoint; then False.

        Raises:
            RunError: no room and no older checkpoint, or a file cannot be written.
        """
        self._finish()
        place, lack = None, ""
        if self._local is not None and not last:
            place, lack = self._local.place(state.step, self._estimate)
            if lack:
                self._warn(f"{lack}; it goes to {self._root} at once")
        if place is None and not self._room_here(state.step):
            return False
        root = self._root if place is None or self._local is None else self._local.root
        try:
            partial = store.begin(root, state, self._settings, ahead)
            if place is not None:
                write_place(partial, place)
        except OSError as e:
            raise RunError(f"{root}: cannot save step {state.step}: {e}") from e
        self._writers.begin_save(partial / store.TRAINER, state.step, place and place.folder)
        self._pending = root, state.step
        if seal:
            self.seal()
        return True

    def seal(self) -> None:
        """Finish what `save` has begun, unless the ranks write in the background."""
        if not self._config.asynchronous:
            self._finish()

    @property
    def pending(self) -> bool:
        """Whether a save is being written, or copied."""
        return self._pending is not None or bool(self._copies and self._copies.steps)

    def rescue(self, state: LoopState, ahead: Ahead | Outstanding | None = None) -> None:
        """Finish a save under way, and save the state unless it is saved already; does not return before all is on
        disk. A failure is only told, for the run has another error."""
        try:
            if self.is_saved(state.step) and not self.pending:
                return
            held = self._writers.held_step()  # first: who waits for a rank that is gone waits long
            self.wait()
            if self._local and self._copies and self._local.find(state.step) and not self.is_saved(state.step):
                self._copies.want(state.step)
                self._copies.wait()
            if self.is_saved(state.step):
                return
            if held != state.step:
                raise RunError("the update after it has changed weights already")
            if self.save(state, ahead, last=True):
                self.wait()
                self._warn(f"step {state.step} is saved: started again, the run goes on from there")
        except (RunError, UserError, *ORDINARY) as e:
            self.give_up(state.step, str(e).partition("\n")[0])

    def give_up(self, step: int, why: str) -> None:
        """Say that a step is not saved, if it is not."""
        if self.is_saved(step):
            return
        alone = self._local is not None and self._local.find(step) is not None
        what = "saved on the nodes' own disks alone" if alone else "not saved"
        self._warn(f"step {step} is {what}: {why}")

    def is_saved(self, step: int) -> bool:
        """Whether the run's folder has a checkpoint of it."""
        return step in map(store.step_of, store.complete(self._root))

    def goes_on_from(self, folder: Path) -> None:
        """The run does; a local checkpoint that has no copy yet gets one."""
        if self._copies and is_local(folder) and not self.is_saved(store.step_of(folder)):
            self._copies.want(store.step_of(folder))

    def poll(self) -> None:
        """Finish a save that is written, and a copy that is made; does not wait for one."""
        if self._pending is not None and self._writers.save_written():
            self._finish()
        if self._copies is not None:
            self._copies.poll()

    def wait(self) -> None:
        """Finish the save under way, if any, and copies.

        Raises:
            RunError: it cannot be written; checkpoints before it are untouched.
        """
        self._finish()
        if self._copies is not None:
            self._copies.wait()

    def _finish(self) -> None:
        if self._pending is None:
            return
        (root, step), self._pending = self._pending, None
        with contextlib.ExitStack() as stack:
            stack.callback(store.sweep, root)
            entries = self._writers.finish_save()
            try:
                store.finish(root, step, {f"{store.TRAINER}/{name}": e for name, e in entries.items()})
                if root == self._root:
                    self._sealed(step)
            except OSError as e:
                raise RunError(f"{root}: cannot save step {step}: {e}") from e
        if self._local is None or self._copies is None:
            return
        if root == self._root:
            self._local.clear()
            return
        if self._local.due(step):
            self._copies.want(step)
        self._local.prune(self._copies.steps)

    def _sealed(self, step: int) -> None:
        """After a step is on disk."""
        self.durable(step)
        store.prune(self._root, self._config, self._values() if self._config.best_metric else {})

    def _room_here(self, step: int) -> bool:
        """Whether there is room in `root`, once copies under way are there; says where there is not."""
        if self._copies is not None:
            self._copies.wait()
        store.sweep(self._root)
        older = store.complete(self._root)
        text = self._lack(step, store.size(older[-1]) if older else self._estimate)
        if text and not older:
            raise RunError(text)
        if text:
            self._warn(f"{text}; the newest checkpoint stays {older[-1].name}")
        return not text

    def _room_for_copy(self, step: int, size: int) -> bool:
        text = self._lack(step, size)
        if text:
            self._warn(f"{text}; it stays on the nodes' own disks alone")
        return not text

    def _lack(self, step: int, size: int) -> str:
        need = int(size * MARGIN)
        free = free_bytes(self._root)
        if free >= need:
            return ""
        return (
            f"{self._root}: no room to save step {step}: {free / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB needed; free "
            "some or lower checkpoint.keep_last"
        )
