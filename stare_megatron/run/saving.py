"""When a run saves and exports, what it saves, and how it goes on from there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stare_megatron import checkpoint
from stare_megatron.algo.algorithm import EntropyController
from stare_megatron.config import Config
from stare_megatron.errors import RunError
from stare_megatron.metrics import eval_records, jsonl, wandb_id
from stare_megatron.run.folder import RunFolder
from stare_megatron.run.recorder import Recorder, Remembered
from stare_megatron.run.sampling import Kept, Sampler

if TYPE_CHECKING:
    from stare_megatron.run.weights import Weights


class Saving:
    """Saves and exports as `[checkpoint]` says. `resume_from`: the checkpoint to go on from; None: a new run.

    A context around the loop: when an exception ends it, the step learned last is saved, unless the ranks that hold it
    are gone, or in the middle of the next step, or the user wants an end at once; then that is said.
    """

    def __init__(
        self,
        config: Config,
        saver: checkpoint.Saver,
        weights: Weights,
        sampler: Sampler[Any],
        controller: EntropyController,
        recorder: Recorder[Any],
        resume_from: Path | None,
    ) -> None:
        self._config = config
        self._folder = RunFolder(config.folder, fresh=False)
        self._saver = saver
        self._weights = weights
        self._trainers = weights.trainers
        self._sampler = sampler
        self._controller = controller
        self._recorder = recorder
        self._resume_from = resume_from
        self._learned: tuple[checkpoint.LoopState, Kept] | None = None
        self._begun = False  # what was begun is the run's last save

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._saver.wait()  # for a copy of what the run went on from, if there was no step to do
        if self._learned is None or error is None:
            return
        state, kept = self._learned
        if isinstance(error, KeyboardInterrupt):
            self._saver.give_up(state.step, "the run was stopped at once")
            return
        ahead = None
        with contextlib.suppress(RunError):  # lost groups are sampled again
            ahead = kept()
        self._saver.rescue(state, ahead)

    def restore(self) -> int:
        """Load the checkpoint to go on from, if any; the prompts were put in place before. Returns the steps done.

        Later checkpoints of this run, of which it is no continuation, are set aside.

        Raises:
            UserError: it cannot be loaded into this model. MissingFilesError: some rank has not all of its files.
            RunError: later ones cannot be renamed.
        """
        if self._resume_from is None:
            return 0
        self._recorder.status(f"restoring {self._resume_from}")
        state = checkpoint.read(self._resume_from)
        self._trainers.restore(self._resume_from / "trainer")
        self._controller.state = state.controller
        self._weights.baseline = state.probe_baseline
        self._recorder.remembered = Remembered(state.trained_tokens, state.before, state.duty)
        set_aside(self._folder.checkpoints, self._resume_from, state.step, self._recorder.note)
        self._saver.goes_on_from(self._resume_from)
        return state.step

    def due(self, step: int) -> bool:
        every = self._config.checkpoint.every
        return step == self._config.run.steps or bool(every and step % every == 0)

    def save(self, step: int, *, last: bool) -> None:
        """Save `step`. `last`: in the run's folder, and wait until it is on disk."""
        self._saver.save(self._state(step), self._sampler.ahead()(), last=last)
        if last:
            self._saver.wait()

    def begin(self, step: int) -> None:
        """Begin to save `step` before its push and its row in the metrics; `complete` must follow these."""
        self._begun = step == self._config.run.steps
        self._saver.save(self._state(step), self._sampler.ahead()(), last=self._begun, seal=False)

    def complete(self, step: int, *, last: bool) -> bool:
        """Go on with what `begin` began, as `save` does. False: it is not in the run's folder, as `last` wants it."""
        if not last:
            self._saver.seal()
            return True
        self._saver.wait()
        return self._begun or self._saver.is_saved(step)

    def stopped(self, step: int) -> None:
        """An end is wanted while the batch after `step` is sampled, which the ranks know nothing of: save `step` with
        what there is of that batch; where it is saved already, its shelf in the bank has what was finished since."""
        self._recorder.note(f"the batch of step {step + 1} is not waited for; what there is of it goes on with the run")
        self._saver.wait()
        if not self._saver.is_saved(step):
            self.save(step, last=True)

    def poll(self) -> None:
        if self._saver.pending:
            with self._recorder.phase("save"):
                self._saver.poll()

    def learned(self, step: int) -> None:
        """The ranks hold `step` now; prompts that are taken later are taken again by who goes on from it."""
        self._learned = self._state(step), self._sampler.ahead()

    def export_due(self, step: int) -> bool:
        keep = self._config.checkpoint
        by_number = bool(keep.export_every and step % keep.export_every == 0)
        return by_number or (keep.export_final and step == self._config.run.steps)

    def export(self, step: int) -> None:
        """Write the policy as a Hugging Face checkpoint: the final one to `hf/`, others to `exports/`."""
        keep = self._config.checkpoint
        if keep.export_every and step % keep.export_every == 0:
            self._trainers.export_hf(self._folder.exports / f"step_{step:06d}")
        if keep.export_final and step == self._config.run.steps:
            self._recorder.status("exporting the policy")
            self._trainers.export_hf(self._folder.export)

    def _state(self, step: int) -> checkpoint.LoopState:
        past = self._recorder.remembered
        wandb_run = wandb_id.read(self._folder.path)
        return checkpoint.LoopState(
            step,
            past.trained_tokens,
            self._sampler.state(),
            self._controller.state,
            past.before,
            past.duty,
            wandb_run,
            self._weights.baseline,
        )


def set_aside(root: Path, folder: Path, step: int, note: Callable[[str], None]) -> None:
    """A run with these `checkpoints/` goes on from `folder`, of that step: what it had saved later is set aside, and
    the user is told.

    Raises:
        RunError: a folder cannot be renamed.
    """
    try:
        left = checkpoint.set_aside(root, folder, step)
        if folder.resolve().is_relative_to(root.resolve()):
            checkpoint.drop_local(root, after=step)
    except OSError as e:
        raise RunError(f"{root}: cannot set aside the checkpoints after step {step}: {e}") from e
    if left:
        names = ", ".join(path.name for path in left)
        note(f"the run goes on from step {step}: what it had saved later is kept as {names}")


def metric_by_step(folder: Path, metric: str) -> dict[int, float]:
    """A metric of the run so far, or of its evaluations, by step."""
    tables = [t for t in (folder / jsonl.FILE, folder / eval_records.TABLE) if t.exists()]
    return {int(row["step"]): row[metric] for table in tables for row in jsonl.read(table) if metric in row}
