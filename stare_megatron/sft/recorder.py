"""What is written down of a supervised run: the seconds and metrics of each step, and what each process did."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

from stare_megatron.cluster.activity import ActivityLog
from stare_megatron.config import SftConfig
from stare_megatron.host.memory import host_memory
from stare_megatron.metrics.catalogue import Metric
from stare_megatron.metrics.reduce import reduce
from stare_megatron.metrics.sinks import Sinks
from stare_megatron.metrics.trace import DRIVER, StepTrace, TraceFile
from stare_megatron.run.rates import Rates
from stare_megatron.run.recorder import Clock
from stare_megatron.sft.batches import Batch
from stare_megatron.sft.session import Ranks
from stare_megatron.types import Measured, UpdateStats
from stare_megatron.types.report import Activity

_MB = 2**20
# What ranks report of phases that this run has.
_REPORTED = ("memory/trainer_peak_update", "throughput/saved", "rates/save_gbps")


class Recorder:
    """Writes to the sinks and to `trace.jsonl`. `trained_tokens`: learned tokens of all steps so far."""

    def __init__(self, config: SftConfig, session: Ranks, sinks: Sinks, rates: Rates) -> None:
        self._session = session
        self._sinks = sinks
        self._rates = rates
        self._clock = Clock()
        self._file = TraceFile(config.folder) if config.logging.trace else None
        self._driver = ActivityLog()
        self._begun = time.time(), time.monotonic()
        self._tracks: dict[str, list[Activity]] = {}
        self._open = 0  # tokens of the step that is recorded and not closed
        self.trained_tokens = 0

    def status(self, text: str) -> None:
        """Tell the user what is going on."""
        self._sinks.status(text)

    def note(self, text: str) -> None:
        """Tell the user something that stays on the screen."""
        self._sinks.note(text)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step: `update`, `save` or `eval`."""
        self.status(name)
        with self._clock.phase(name), self._driver.during(name), self._session.lookout.during(name):
            yield

    def remember(self, done: UpdateStats) -> None:
        """Count a step that was learned, before it is saved."""
        self.trained_tokens += int(done.part("throughput/trained_tokens").total)

    def record(self, step: int, epoch: int, batch: Batch, done: UpdateStats) -> None:
        """Log a step that was learned, and remembered. What it takes from here on is added by `close`."""
        reports = self._gather()
        host, mb = host_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rates = self._rates.of_phases([], [summary for _, summary in batch.groups], self._clock.seconds)
        measured = (
            *done.measured,
            Measured("data/epoch", epoch),
            Measured("sft/sequences", len(batch.groups)),
            Measured("sft/tokens", batch.tokens),
            Measured("throughput/trained_tokens_total", self.trained_tokens),
            Measured("time/update", self._clock.seconds.get("update", 0.0)),
            Measured("time/elapsed", self._clock.elapsed),
            *(part for part in rates if part.name.startswith("rates/update")),
            *reports,
            *self._session.trainers.memory(),
            Measured("memory/driver_peak", mb),
            Measured("memory/host_run", host.run / _MB),
            Measured("memory/host_available", host.available / _MB),
        )
        self._open = batch.tokens
        self._sinks.log(step, reduce(measured), self._late())

    def close(self, step: int) -> None:
        """The step is over: log what saving and evaluating took, and begin the next."""
        self._gather()
        if self._open:
            self._sinks.complete(step, self._late())
            self._open = 0
        start, began = self._begun
        whole = Activity(f"step {step}", start, time.monotonic() - began)
        driver = (whole, *self._driver.take())
        if self._file is not None:
            self._file.append(StepTrace(step, {DRIVER: driver, **self._tracks}, ()))
        self._begun, self._tracks = (time.time(), time.monotonic()), {}
        self._clock.restart()
        self._session.lookout.step = step + 1

    def _gather(self) -> list[Measured]:
        """Ask every rank what it did since it was last asked."""
        found = []
        for i, report in enumerate(self._session.trainers.report()):
            self._tracks.setdefault(f"trainer rank {i}", []).extend(report.activities)
            found.append(Measured("memory/trainer_peak", report.peak_bytes / _MB))
            found += [part for part in report.measured if part.name in _REPORTED]
        return found

    def _late(self) -> tuple[Metric, ...]:
        """The metrics that are settled when the step is over, as they are now."""
        seconds = self._clock.step_seconds
        return reduce(
            (
                *(Measured(f"time/{phase}", self._clock.seconds.get(phase, 0.0)) for phase in ("save", "eval")),
                Measured("time/step", seconds),
                Measured("throughput/tokens_per_second", self._open, seconds),
                self._rates.of_step(self._open, seconds),
            )
        )
