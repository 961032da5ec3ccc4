"""The loop of supervised training: take a batch, learn it, measure the held-out loss, save."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stare_megatron.errors import GivenUpError
from stare_megatron.sft.batches import batch_of

if TYPE_CHECKING:
    from stare_megatron.cluster.supervised import SupervisedGroup
    from stare_megatron.data.supervised import BatchStream, SequenceSet
    from stare_megatron.run.stop import StopSignal
    from stare_megatron.sft.batches import HeldOut
    from stare_megatron.sft.recorder import Recorder
    from stare_megatron.sft.saving import Saving


@dataclass(frozen=True)
class Run:
    """Everything a step needs, put together in `start.py`. `steps`: of the whole run."""

    steps: int
    sequences: SequenceSet
    stream: BatchStream
    trainers: SupervisedGroup
    held_out: HeldOut
    recorder: Recorder
    saving: Saving
    stop: StopSignal


def learn(run: Run) -> int:
    """Learn until `run.steps` are done or the user asks for an end; returns the number of steps done."""
    step = run.saving.restore()
    with run.saving:  # whatever ends the loop: the step learned last is saved, or why it is not is said
        _measure_when_due(run, step)
        run.recorder.close(step)
        stopping = run.stop.asked
        while step < run.steps and not stopping:
            with run.recorder.phase("update"):
                chosen = run.stream.take()
                batch = batch_of(run.sequences, chosen)
                done = run.trainers.fit(batch)
            step += 1
            run.recorder.remember(done)
            run.saving.learned(step)
            run.saving.poll()
            run.recorder.record(step, run.stream.state().epoch, batch, done)
            _measure_when_due(run, step)
            stopping = run.stop.asked  # read once: a later wish is granted one step later, and that step saved
            run.saving.save_when_due(step, last=stopping or step == run.steps)
            run.recorder.close(step)
    return step


def _measure_when_due(run: Run, step: int) -> None:
    """Not when an end is wanted, nor is one waited for then: what a stop leaves out is due when the run goes on."""
    if not held_out_is_due(run, step):
        return
    if not run.stop.asked:
        with run.recorder.phase("eval"), contextlib.suppress(GivenUpError):
            run.held_out.measure(run.trainers, step, lambda: run.stop.asked)
    if held_out_is_due(run, step):
        run.recorder.note(f"the held-out loss of step {step} is not waited for: the run that goes on measures it")


def held_out_is_due(run: Run, step: int) -> bool:
    """Whether the held-out loss after `step`, the newest, is to be measured and was not yet."""
    return run.held_out.due(step, epoch_is_over=run.stream.epoch_is_over)
