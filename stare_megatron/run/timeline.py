"""When each process of a run does what: how idle they were, and the run's trace."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stare_megatron.cluster.activity import ActivityLog, busy_seconds
from stare_megatron.metrics.trace import DRIVER, StepTrace, TraceFile
from stare_megatron.types import Measured
from stare_megatron.types.report import Activity, EngineLoad

if TYPE_CHECKING:
    from stare_megatron.run.session import Session


@dataclass(frozen=True)
class Gathered:
    """What processes took, of each engine and each rank. `peaks` in bytes; `measured`: of all ranks."""

    loads: Sequence[EngineLoad]
    engine_peaks: Sequence[int]
    trainer_peaks: Sequence[int]
    measured: Sequence[Measured]


class Timeline:
    """Collects the activities of a step from every process. `folder`: of the run; None: no trace is written."""

    def __init__(self, session: Session, folder: Path | None) -> None:
        self._session = session
        self._file = TraceFile(folder) if folder else None
        self._driver = ActivityLog()
        self._begin()

    def during(self, phase: str) -> AbstractContextManager[None]:
        """A phase of the driver's."""
        return self._driver.during(phase)

    def gather(self) -> Gathered:
        """Ask every process what it did since it was last asked."""
        engines, ranks = self._session.engines.report(), self._session.trainers.report()
        for kind, reports in (("engine", engines), ("trainer rank", dict(enumerate(ranks)))):
            for i, report in reports.items():
                self._tracks.setdefault(f"{kind} {i}", []).extend(report.activities)
        return Gathered(
            loads=[report.load for report in engines.values()],
            engine_peaks=[report.peak_bytes for report in engines.values()],
            trainer_peaks=[report.peak_bytes for report in ranks],
            measured=[part for report in ranks for part in report.measured],
        )

    def idle(self) -> tuple[Measured, ...]:
        """Of each process, as far as gathered: time in which it did nothing, of that since the step began."""
        step = time.monotonic() - self._began
        return tuple(
            Measured("idle/engines" if name.startswith("engine") else "idle/trainers", max(0.0, step - busy), step)
            for name, activities in self._tracks.items()
            for busy in [busy_seconds(tuple(activities))]
        )

    def close(self, step: int, trained: Sequence[str]) -> None:
        """The step is over. `trained`: the prompts of its update batch."""
        whole = Activity(f"step {step}", self._start, time.monotonic() - self._began)
        driver = (whole, *self._driver.take())
        if self._file is not None:
            self._file.append(StepTrace(step, {DRIVER: driver, **self._tracks}, trained))
        self._begin()

    def _begin(self) -> None:
        self._start, self._began = time.time(), time.monotonic()
        self._tracks: dict[str, list[Activity]] = {}
