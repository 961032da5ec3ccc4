"""When a supervised run saves and exports, and how it goes on from there."""

from __future__ import annotations

import functools
from pathlib import Path
from types import TracebackType

from stare_megatron import checkpoint
from stare_megatron.algo.controller import ControllerState
from stare_megatron.cluster.supervised import SupervisedGroup
from stare_megatron.config import SftConfig
from stare_megatron.data.supervised import BatchStream
from stare_megatron.metrics import wandb_id
from stare_megatron.run.folder import RunFolder
from stare_megatron.run.saving import metric_by_step, set_aside
from stare_megatron.sft.recorder import Recorder
from stare_megatron.types import UNOBSERVED, GateDuty


class Saving:
    """Saves and exports as `[checkpoint]` says. `resume_from`: the checkpoint to go on from; None: a new run.

    A context around the loop: when an exception ends it, the step learned last is saved, as in a run of `train`.
    """

    def __init__(
        self,
        config: SftConfig,
        settings: checkpoint.Settings,
        folder: RunFolder,
        trainers: SupervisedGroup,
        stream: BatchStream,
        recorder: Recorder,
        resume_from: Path | None,
        estimate: int,
    ) -> None:
        self._config = config
        self._folder = folder
        self._trainers = trainers
        self._stream = stream
        self._recorder = recorder
        self._resume_from = resume_from
        self._learned: checkpoint.LoopState | None = None
        self._saver = checkpoint.Saver(
            folder.checkpoints,
            config.checkpoint,
            settings,
            trainers,
            estimate=estimate,
            values=functools.partial(metric_by_step, folder.path, config.checkpoint.best_metric),
            warn=recorder.note,
        )

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._learned is None or error is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self._saver.give_up(self._learned.step, "the run was stopped at once")
        else:
            self._saver.rescue(self._learned)

    def restore(self) -> int:
        """Load the checkpoint to go on from, if any; the batches were put in place before. Returns the steps done.

        Raises:
            UserError: it cannot be loaded into this model. RunError: later ones cannot be renamed.
        """
        if self._resume_from is None:
            return 0
        self._recorder.status(f"restoring {self._resume_from}")
        state = checkpoint.read(self._resume_from)
        self._trainers.restore(self._resume_from / "trainer")
        self._recorder.trained_tokens = state.trained_tokens
        set_aside(self._folder.checkpoints, self._resume_from, state.step, self._recorder.note)
        return state.step

    def learned(self, step: int) -> None:
        """The ranks hold `step` now."""
        self._learned = checkpoint.LoopState(
            step=step,
            trained_tokens=self._recorder.trained_tokens,
            stream=self._stream.state(),
            controller=ControllerState(1.0, 1.0),  # nothing is controlled
            before=UNOBSERVED,
            duty=GateDuty(0, 0),
            wandb_run=wandb_id.read(self._folder.path),
        )

    def poll(self) -> None:
        """Finish a save that is written; does not wait for one."""
        if self._saver.pending:
            with self._recorder.phase("save"):
                self._saver.poll()

    def save_when_due(self, step: int, *, last: bool) -> None:
        """Save and export the step learned last. `last`: the run ends after it, so wait until it is on disk."""
        keep, steps = self._config.checkpoint, self._config.run.steps
        assert self._learned is not None
        if last or (keep.every and step % keep.every == 0):
            with self._recorder.phase("save"):
                self._saver.save(self._learned)
                if last:
                    self._saver.wait()
        if keep.export_every and step % keep.export_every == 0:
            with self._recorder.phase("save"):
                self._trainers.export_hf(self._folder.exports / f"step_{step:06d}")
        if keep.export_final and step == steps:
            with self._recorder.phase("save"):
                self._recorder.status("exporting the model")
                self._trainers.export_hf(self._folder.export)
