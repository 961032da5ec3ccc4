"""What is written down of a run: the seconds and metrics of each step, and samples of it."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from stare_megatron.config import Config
from stare_megatron.errors import GroupsLostError
from stare_megatron.host.memory import host_memory
from stare_megatron.metrics.catalogue import Metric
from stare_megatron.metrics.sample_records import write_sample_records
from stare_megatron.metrics.samples import FOLDER, Decode, choose, excerpt, pick, table, write_samples
from stare_megatron.metrics.sinks import Sinks
from stare_megatron.rollout.collect import Collected
from stare_megatron.run.gain_watch import GainWatch
from stare_megatron.run.rates import Rates
from stare_megatron.run.sampling import Sampler
from stare_megatron.run.step_metrics import Progress, StepCosts, late_metrics, observed, step_metrics
from stare_megatron.run.timeline import Timeline
from stare_megatron.types import UNOBSERVED, Control, GateDuty, Group, Measured, Observed, StepStats

if TYPE_CHECKING:
    from stare_megatron.run.session import Session

Ref = TypeVar("Ref")


class Clock:
    """Seconds of the phases of a step. A step begins where the one before was closed."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.restart()

    def restart(self) -> None:
        """A step begins."""
        self.seconds: dict[str, float] = {}
        self._step_start = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds within to those of `name`, also when they end in an error."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    @property
    def step_seconds(self) -> float:
        """Of the step so far, without evaluating."""
        return time.monotonic() - self._step_start - self.seconds.get("eval", 0.0)

    @property
    def elapsed(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self._start


@dataclass(frozen=True)
class Remembered:
    """What metrics need of earlier steps: action tokens trained on, the step before, how often the gate was open."""

    trained_tokens: int
    before: Observed
    duty: GateDuty


class Recorder(Generic[Ref]):
    """Writes to the sinks and to `samples/`.

    Args:
        fetch: groups by the references that stand for them.
        decode: token ids -> text.
        rates: of the run's devices.
    """

    def __init__(
        self,
        config: Config,
        session: Session,
        sampler: Sampler[Collected[Ref]],
        sinks: Sinks,
        fetch: Callable[[Sequence[Ref]], Sequence[Group]],
        decode: Decode,
        rates: Rates,
    ) -> None:
        self._config = config
        self._session = session
        self._sampler = sampler
        self._sinks = sinks
        self._fetch = fetch
        self._decode = decode
        self._rates = rates
        self._clock = Clock()
        self._timeline = Timeline(session, config.folder if config.logging.trace else None)
        self._open: Collected[Ref] | None = None  # the batch of the step that is recorded and not closed
        self.remembered = Remembered(0, UNOBSERVED, GateDuty(0, 0))
        self._before = UNOBSERVED
        self._gain = GainWatch(config, self.note)

    def status(self, text: str) -> None:
        """Tell the user what is going on."""
        self._sinks.status(text)

    def note(self, text: str) -> None:
        """Tell the user something that stays on the screen."""
        self._sinks.note(text)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step, tell the user of it, and watch that it does not hang."""
        self.status(name)
        with self._clock.phase(name), self._timeline.during(name), self._session.lookout.during(name):
            yield

    def shows_tokens(self, step: int) -> bool:
        """Whether samples of `step` are written."""
        every = self._config.logging.samples_every
        return bool(every) and (step % every == 0 or step == 1)

    def remember(self, control: Control, done: StepStats) -> None:
        """What later steps need to know of the step just learned, recorded or not."""
        past = self.remembered
        trained, duty = past.trained_tokens + done.scores.num_action_tokens, past.duty.after(control)
        self._before = past.before
        self.remembered = Remembered(trained, observed(done.scores, done.updates), duty)
        self._gain.saw(control)

    def record(
        self, step: int, batch: Collected[Ref], control: Control, done: StepStats, probe: Sequence[Measured]
    ) -> None:
        """Log the step just remembered and write its samples. What it takes from here on is added by `close`. `probe`:
        what was measured of the push."""
        known, taken = self.remembered, self._timeline.gather()
        costs = StepCosts(
            seconds=self._clock.seconds,
            elapsed=self._clock.elapsed,
            trainer_peaks=taken.trainer_peaks,
            engine_peaks=taken.engine_peaks,
            trainer_memory=(*self._session.trainers.memory(), *taken.measured),
            driver_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            host=host_memory(),
            loads=taken.loads,
            rates=self._rates.of_phases(
                batch.sampled, [s for _, s in batch.groups], self._clock.seconds | {"rollout": batch.seconds}
            ),
            fleet=self._session.engines.measured(),
        )
        progress = Progress(self._sampler.state().epoch, known.trained_tokens, self._before, known.duty)
        values = step_metrics(step, batch, done.scores, control, done.updates, probe, costs, progress)
        self._open = batch
        self._sinks.log(step, values, self._late())
        if self.shows_tokens(step):
            self._write_samples(step, batch)

    def close(self, step: int) -> None:
        """The step is over: log what saving and evaluating took, and begin the next."""
        self._timeline.gather()
        trained: list[str] = []
        if self._open is not None:
            self._sinks.complete(step, self._late())
            trained = [summary.prompt_id for _, summary in self._open.groups]
            self._open = None
        self._clock.restart()
        self._timeline.close(step, trained)
        self._session.lookout.step = step + 1

    def _late(self) -> tuple[Metric, ...]:
        """The metrics that are settled when the step is over, as they are now."""
        assert self._open is not None
        tokens, seconds = self._open.tokens_sampled, self._clock.step_seconds
        rate = self._rates.of_step(tokens, seconds)
        return late_metrics(self._clock.seconds, seconds, tokens, (rate, *self._timeline.idle()))

    def _write_samples(self, step: int, batch: Collected[Ref]) -> None:
        """Some trajectories of the step, as text and as data with what the update knew of their tokens."""
        folder, size = self._config.folder / FOLDER, self._config.rollout.group_size
        places = choose([summary for _, summary in batch.groups], self._config.logging.samples, step)
        wanted = sorted({group for group, _ in places})
        try:
            groups = dict(zip(wanted, self._fetch([batch.groups[i][0] for i in wanted]), strict=True))
        except GroupsLostError as e:  # they were learned from
            self.note(f"samples of step {step} are not written: {e}")
            return
        picked = pick(groups, places)
        records = self._session.trainers.token_records(places)
        write_samples(folder, step, picked, len(batch.groups) * size, len(batch.sampled) * size, self._decode)
        write_sample_records(folder, step, picked, records, self._decode)
        shown = excerpt(picked[step % len(picked)], self._decode)
        self._sinks.sample(step, table(picked, self._decode), shown)
