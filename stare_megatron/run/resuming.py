"""Which checkpoint a run goes on from: at its start, after its ranks were lost, and where nodes lack what they had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from stare_megatron import checkpoint
from stare_megatron.config import Config, SftConfig
from stare_megatron.data.benchmarks import Benchmark
from stare_megatron.data.prompts import PromptStream, StreamState
from stare_megatron.errors import MissingFilesError, UserError
from stare_megatron.metrics import catalogue
from stare_megatron.run import folder as run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stare_megatron.run.session import Session


@dataclass(frozen=True)
class Prepared:
    """What a run needs and has been found right. `resume_from`: the checkpoint to go on from, of step `restored`, with
    the batch sampled `ahead` of it, and the wandb run to go on with."""

    config: Config
    settings: checkpoint.Settings
    tokenizer: PreTrainedTokenizerBase
    stream: PromptStream
    benchmarks: Sequence[Benchmark]
    resume_from: Path | None
    restored: int
    ahead: checkpoint.Ahead | checkpoint.Outstanding | None
    wandb_run: str
    sandbox: str
    notes: tuple[str, ...]


def find(config: Config | SftConfig, console: Console) -> Path | None:
    """The checkpoint to go on from, found undamaged, unless it lies on the nodes' own disks: those are looked at when
    the ranks are there.

    Raises:
        UserError: `run.resume` names none, or it is damaged; an unknown `checkpoint.best_metric`.
    """
    if config.checkpoint.best_metric:
        try:
            catalogue.entry(config.checkpoint.best_metric)
        except ValueError as e:
            raise UserError(f"checkpoint.best_metric = {config.checkpoint.best_metric!r}: {e}") from e
    root = config.folder / run_folder.CHECKPOINTS
    if config.run.resume == "auto" and (choices := checkpoint.newest_first(root)) and checkpoint.is_local(choices[0]):
        return choices[0]
    found = checkpoint.find(root, config.run.resume)
    if found is not None:
        console.print(f"checking {found}", markup=False, highlight=False, soft_wrap=True)
        checkpoint.verify(found, contents=config.checkpoint.verify)
    return found


def at(prepared: Prepared, found: Path, state: checkpoint.LoopState) -> Prepared:
    """`prepared` to go on from a checkpoint with this state, its prompts included."""
    prepared.stream.restore(state.stream)
    ahead = checkpoint.read_ahead(found)
    return dataclasses.replace(prepared, resume_from=found, restored=state.step, ahead=ahead)


class Choice:
    """Chooses again once there are ranks. `root`: `checkpoints/`; `start`: where this start of the run stands in the
    prompts; `note`: shows the user a line."""

    def __init__(self, root: Path, start: StreamState, note: Callable[[str], None]) -> None:
        self._root = root
        self._start = start
        self._note = note
        self._unreadable: dict[Path, str] = {}

    def checked(self, prepared: Prepared, session: Session, *, contents: bool) -> Prepared:
        """`prepared` to go on from the newest checkpoint that all ranks can read. `contents`: compare checksums.

        Raises:
            UserError: that one is damaged. RunError: a rank is gone.
        """
        root, refused = self._root, self._unreadable
        found = checkpoint.newest(root, session.trainers, contents=contents, say=self._note, unreadable=refused)
        if found is not None:
            return at(prepared, found, checkpoint.read(found))
        start = self._start
        if prepared.resume_from is not None and checkpoint.is_local(prepared.resume_from):
            checkpoint.drop_local(root, after=0)
            start = dataclasses.replace(start, epoch=0, cursor=0)
            prepared = dataclasses.replace(prepared, resume_from=None, restored=0, ahead=None)
        prepared.stream.restore(start)
        return prepared

    def last(self, prepared: Prepared, session: Session) -> Prepared:
        """As `checked`, for ranks that were lost and are back: from the newest checkpoint of this run or, where there
        is none, from where this start did."""
        return self.checked(prepared, session, contents=False)

    def without(self, prepared: Prepared, session: Session, why: str) -> Prepared:
        """As `checked`, when the ranks could not read what they were to go on from.

        Raises:
            MissingFilesError: that is no local checkpoint.
        """
        folder = prepared.resume_from
        if folder is None or not checkpoint.is_local(folder):
            raise MissingFilesError(why)
        self._unreadable[folder] = why
        return self.checked(prepared, session, contents=prepared.config.checkpoint.verify)
