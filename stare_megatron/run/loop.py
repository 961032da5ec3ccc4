"""The training loop. What happens in a step and in which order; how is behind `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

from stare_megatron.types import Control, EntropyReading, ScoreSummary, StepStats, UpdateStats

Batch = TypeVar("Batch")


class Run(Protocol, Generic[Batch]):
    """Everything a step needs, put together in `build.py`."""

    steps: int

    def restore(self) -> int:
        """Load the checkpoint to resume from, if any; returns the number of steps done."""
        ...

    def push(self, version: int) -> float:
        """Stream the weights into the engines; returns the probe's mean |log-prob difference|, nats."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase; when devices are shared, give them to whoever works in it."""
        ...

    def collect(self, step: int) -> Batch:
        """Sample groups with rewards."""
        ...

    def load(self, batch: Batch) -> None:
        """Hand the groups to the trainer ranks."""
        ...

    def score(self) -> EntropyReading:
        """Log-probs and entropies of the policy about to be updated, or an estimate of their mean."""
        ...

    def observe(self, reading: EntropyReading) -> Control:
        """The gate."""
        ...

    def update(self, control: Control) -> StepStats:
        """Weigh tokens, take the optimizer steps."""
        ...

    def report(
        self,
        step: int,
        batch: Batch,
        scores: ScoreSummary,
        control: Control,
        updates: Sequence[UpdateStats],
        probe: float,
    ) -> None:
        """Log the step."""
        ...

    def eval_due(self, step: int) -> bool: ...

    def evaluate(self, step: int) -> None:
        """Sample and grade held-out prompts with the policy of `step`, which the engines have; log it."""
        ...

    def save_due(self, step: int) -> bool: ...

    def save(self, step: int) -> None:
        """Save a checkpoint; it may be written while the loop goes on."""
        ...

    def export_due(self, step: int) -> bool: ...

    def export(self, step: int) -> None:
        """Write the policy for others to use."""
        ...

    def stopping(self) -> bool:
        """The user asked for an end."""
        ...


def train(run: Run[Batch]) -> int:
    """Train until `run.steps` are done or the user asks for an end; returns the number of steps done."""
    step = run.restore()
    with run.phase("push"):
        run.push(step)
    if run.eval_due(step):
        with run.phase("eval"):
            run.evaluate(step)
    while step < run.steps and not run.stopping():
        with run.phase("rollout"):
            batch = run.collect(step)
        with run.phase("score"):
            run.load(batch)
            reading = run.score()
        control = run.observe(reading)
        with run.phase("update"):
            done = run.update(control)
        step += 1
        with run.phase("push"):
            probe = run.push(step)
        run.report(step, batch, done.scores, control, done.updates, probe)
        if run.eval_due(step):
            with run.phase("eval"):
                run.evaluate(step)
        if run.save_due(step) or run.stopping():
            with run.phase("save"):
                run.save(step)
        if run.export_due(step):
            with run.phase("save"):
                run.export(step)
    return step
