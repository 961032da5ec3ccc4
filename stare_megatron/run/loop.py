"""The training loop: what happens in a step, in which order, and who has the devices meanwhile.

            engines                      driver                        trainer ranks
               |       residency: the engines have the devices               |
    rollout  sample  <------ prompts of the next batch                       :
               | -------- groups with rewards ------> |                      :
               :       residency: the trainer has the devices                |
    score      :                                      | ---- load, score ->  |
               :                  controller: gate <--|---- mean entropy --- |
    update     :                                      | ---- control ----->  | optimizer steps
    push       | <---------------- weights of the new version -------------- |
               |       residency: the engines have the devices               :
               | ---- probe: both give a prompt the same log-probs --------> |
             record the step; evaluate, save and export when due

Each arrow waits for the one before: nobody samples while the ranks train. How each part works is behind `Run`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from stare_megatron.run.sampling import Sampler
from stare_megatron.types import Control, EntropyReading, StepStats

Batch = TypeVar("Batch")
Batch_in = TypeVar("Batch_in", contravariant=True)


class Trainer(Protocol[Batch_in]):
    """The trainer ranks."""

    def load(self, batch: Batch_in) -> None:
        """Take an update batch."""
        ...

    def score(self) -> EntropyReading:
        """Log-probs and entropies of the policy about to be updated, or an estimate of their mean."""
        ...

    def update(self, control: Control, *, keep_tokens: bool) -> StepStats:
        """Weigh tokens, take the optimizer steps."""
        ...


class Controller(Protocol):
    """The entropy controller."""

    def observe(self, reading: EntropyReading) -> Control:
        """Advance the controller; return this step's control."""
        ...


class Residency(Protocol):
    """Who has the devices that engines and trainer share."""

    def to_trainer(self) -> None: ...

    def to_engines(self) -> AbstractContextManager[None]:
        """Within the context both hold the policy's weights, so that they can be pushed."""
        ...


class Weights(Protocol):
    """The way of the weights into the engines."""

    def push(self, version: int) -> None: ...

    def probe(self, version: int) -> float:
        """Mean |log-prob difference| between engines and trainer on the probe prompt, nats; NaN when none is due."""
        ...


class Recorder(Protocol[Batch_in]):
    """What is written down of a run."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase of the step, and tell the user of it."""
        ...

    def shows_tokens(self, step: int) -> bool:
        """Whether samples of `step` are written, which takes what its update knew of their tokens."""
        ...

    def record(self, step: int, batch: Batch_in, control: Control, done: StepStats, probe: float) -> None: ...

    def close(self, step: int) -> None:
        """The step is over, saving and evaluating included."""
        ...


class Evaluations(Protocol):
    """Evaluation of the policy that the engines hold."""

    def due(self, step: int) -> bool: ...

    def evaluate(self, step: int) -> None: ...


class Saving(Protocol):
    """Checkpoints, and exports of the policy."""

    def restore(self) -> int:
        """Load the checkpoint to go on from, if any; returns the number of steps done."""
        ...

    def rescue(self, step: int) -> AbstractContextManager[None]:
        """When sampling fails within the context, what the ranks have learned in `step` steps is saved."""
        ...

    def poll(self) -> None:
        """Finish a save that is written by now."""
        ...

    def due(self, step: int) -> bool: ...

    def save(self, step: int, *, last: bool) -> None:
        """Save a checkpoint; it may be written while the loop goes on, unless no step follows."""
        ...

    def export_due(self, step: int) -> bool: ...

    def export(self, step: int) -> None: ...


class Stop(Protocol):
    """The user's wish to end."""

    asked: bool


@dataclass(frozen=True)
class Run(Generic[Batch]):
    """Everything a step needs, put together in `train.py`. `steps`: of the whole run."""

    steps: int
    sampler: Sampler[Batch]
    trainer: Trainer[Batch]
    controller: Controller
    residency: Residency
    weights: Weights
    recorder: Recorder[Batch]
    evaluations: Evaluations
    saving: Saving
    stop: Stop


def train(run: Run[Batch]) -> int:
    """Train until `run.steps` are done or the user asks for an end; returns the number of steps done."""
    step = run.saving.restore()
    _push(run, step)
    _evaluate_when_due(run, step)
    run.recorder.close(step)
    stopping = run.stop.asked
    while step < run.steps and not stopping:
        with run.recorder.phase("rollout"):
            with run.saving.rescue(step):
                batch = run.sampler.next_batch(step)
            run.residency.to_trainer()
        with run.recorder.phase("score"):
            run.trainer.load(batch)
            reading = run.trainer.score()
        control = run.controller.observe(reading)
        step += 1
        with run.recorder.phase("update"):
            done = run.trainer.update(control, keep_tokens=run.recorder.shows_tokens(step))
        probe = _push(run, step)
        run.saving.poll()
        run.recorder.record(step, batch, control, done, probe)
        _evaluate_when_due(run, step)
        stopping = run.stop.asked  # read once: a wish that comes later is granted one step later, and that step saved
        if run.saving.due(step) or stopping:
            with run.recorder.phase("save"):
                run.saving.save(step, last=stopping or step == run.steps)
        if run.saving.export_due(step):
            with run.recorder.phase("save"):
                run.saving.export(step)
        run.recorder.close(step)
    return step


def _push(run: Run[Batch], version: int) -> float:
    with run.recorder.phase("push"):
        with run.residency.to_engines():
            run.weights.push(version)
        return run.weights.probe(version)


def _evaluate_when_due(run: Run[Batch], step: int) -> None:
    # What a stop leaves out is due when the run goes on.
    if run.evaluations.due(step) and not run.stop.asked:
        with run.recorder.phase("eval"), run.saving.rescue(step):
            run.evaluations.evaluate(step)
