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
             record the step; evaluate, save and export when due; where the ranks' state has been away,
             a save begins before the push

Each arrow waits for the one before. In `sync` mode nobody samples while the ranks train; in `one_step` the groups that
come in `rollout` were sampled during the step before, and the engines sample the next ones from then on until the push
(`sampling.py`); in `stream` they always do, also across pushes. How each part works is behind `Run`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from stare_megatron.rollout.collect import Collected
from stare_megatron.run.sampling import Sampler
from stare_megatron.types import Measured

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stare_megatron.algo.algorithm import EntropyController
    from stare_megatron.cluster.trainers import TrainerGroup
    from stare_megatron.run.evaluation import Evaluations
    from stare_megatron.run.recorder import Recorder
    from stare_megatron.run.residency import Residency
    from stare_megatron.run.saving import Saving
    from stare_megatron.run.stop import StopSignal
    from stare_megatron.run.weights import Weights

Ref = TypeVar("Ref")


@dataclass(frozen=True)
class Run(Generic[Ref]):
    """Everything a step needs, put together in `train.py`. `steps`: of the whole run."""

    steps: int
    sampler: Sampler[Collected[Ref]]
    trainers: TrainerGroup
    controller: EntropyController
    residency: Residency
    weights: Weights
    recorder: Recorder[Ref]
    evaluations: Evaluations[Ref]
    saving: Saving
    stop: StopSignal


def train(run: Run[Ref]) -> int:
    """Train until `run.steps` are done or the user asks for an end; returns the number of steps done."""
    run.residency.to_checkpoint()
    step = run.saving.restore()
    with (
        run.saving,
        run.residency,
        contextlib.closing(run.sampler),
    ):  # whatever ends the loop: the step learned last is saved, or why it is not is said
        _push(run, step)
        _evaluate_when_due(run, step)
        run.recorder.close(step)
        stopping = run.stop.asked
        while step < run.steps and not stopping:
            with run.recorder.phase("rollout"):
                batch = run.sampler.next_batch(step)
                if batch is None:
                    run.residency.to_checkpoint()
                    run.saving.stopped(step)
                    break
                run.residency.to_trainer()
            with run.recorder.phase("score"):
                run.trainers.load(batch)
                reading = run.trainers.score()
            control = run.controller.observe(reading)
            step += 1
            with run.recorder.phase("update"):
                done = run.trainers.update(control, keep_tokens=run.recorder.shows_tokens(step))
            run.recorder.remember(control, done)
            run.saving.learned(step)
            if run.sampler.busy:
                with run.recorder.phase("rollout"):
                    run.sampler.settle()
            early = run.saving.due(step) and run.residency.saves_first
            if early:
                with run.recorder.phase("save"):
                    run.saving.begin(step)
            probe = _push(run, step)
            run.recorder.record(step, batch, control, done, (Measured("sync/probe", probe), run.weights.told))
            run.saving.poll()  # what is saved has its row
            _evaluate_when_due(run, step)
            stopping = run.stop.asked  # read once: a later wish is granted one step later, and that step saved
            if run.saving.due(step) or stopping:
                with run.recorder.phase("save"):
                    last = stopping or step == run.steps
                    if not early or not run.saving.complete(step, last=last):
                        run.residency.to_checkpoint()
                        run.saving.save(step, last=last)
            if run.saving.export_due(step):
                with run.recorder.phase("save"):
                    run.residency.to_checkpoint()
                    run.saving.export(step)
            if run.residency.engines_sleep and step < run.steps and not stopping:
                with run.recorder.phase("save"):  # part of its price: sleep leaves the engines without weights
                    _hand_over(run, step)
            run.recorder.close(step)
    return step


def _push(run: Run[Ref], version: int) -> float:
    with run.recorder.phase("push"):
        return run.weights.probe(version, _hand_over(run, version))


def _hand_over(run: Run[Ref], version: int) -> npt.NDArray[np.float32] | None:
    """The devices and the weights go to the engines. Returns the trainer's scores of the probe, if one is due."""
    with run.residency.to_engines():
        run.weights.push(version)
        return run.weights.score_probe(version)


def _evaluate_when_due(run: Run[Ref], step: int) -> None:
    """Not when an end is wanted, nor is one waited for then: what a stop leaves out is due when the run goes on."""
    if not run.evaluations.due(step):
        return
    if not run.stop.asked:
        with run.recorder.phase("eval"):
            run.sampler.drain()
            with run.stop.calling(run.evaluations.give_up):
                if not run.stop.asked:
                    run.evaluations.evaluate(step)
    if run.evaluations.due(step):
        run.recorder.note(f"the evaluation of step {step} is not waited for: the run that goes on makes it")
