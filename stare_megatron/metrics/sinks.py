"""The sink protocol, several sinks as one, and the sinks a configuration asks for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from stare_megatron.config import Config, Section, flatten
from stare_megatron.metrics import jsonl, prometheus, tensorboard
from stare_megatron.metrics.advice import Settings
from stare_megatron.metrics.catalogue import Metric
from stare_megatron.metrics.console import ConsoleSink
from stare_megatron.metrics.samples import SampleRow


class Sink(Protocol):
    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        """Write one finished step. Steps come in rising order; further values of a step may follow it.

        Raises:
            ConnectionError: who it writes to is gone, and it can log no more.
        """
        ...

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Trajectories of a step, where there is a place for them.

        Raises:
            ConnectionError: as `log`.
        """
        ...

    def rewind(self, step: int) -> None:
        """The steps after `step` are done again, and logged again."""
        ...

    def close(self) -> None:
        """Flush and release. Called once."""
        ...


class Sinks:
    """All sinks of a run, as one. `close` closes each, also when one of them fails."""

    def __init__(self, console: ConsoleSink, record: jsonl.JsonlSink, plotted: Sequence[Sink]) -> None:
        self._console = console
        self._record = record
        self._plotted = list(plotted)

    def status(self, text: str) -> None:
        """Tell the user what is going on now."""
        self._console.status(text)

    def note(self, text: str) -> None:
        """Tell the user something that stays on the screen."""
        self._console.note(text)

    def sample(self, step: int, rows: Sequence[SampleRow], text: str) -> None:
        """Sampled trajectories of a step: `rows` for the plotting sinks; one of them, in one line, for the display."""
        for sink in tuple(self._plotted):
            self._without(sink, functools.partial(sink.samples, step, rows))
        self._console.sample(text)

    def log(self, step: int, metrics: Sequence[Metric], late: Sequence[Metric]) -> None:
        """A step that is done. `late`: metrics that are only settled when it has been saved and evaluated, as they are
        now: the record must not lack the step if the run dies meanwhile, nor the display show it late."""
        self._record.log(step, [*metrics, *late])
        self._plot(step, metrics)
        self._console.log(step, [*metrics, *late])

    def complete(self, step: int, late: Sequence[Metric]) -> None:
        """The settled values of `late`."""
        self._record.amend(late)
        self._plot(step, late)
        self._console.amend(late)

    def log_evaluation(self, step: int, metrics: Sequence[Metric], lines: Sequence[str]) -> None:
        """An evaluation, on record elsewhere: to the plotting sinks, and `lines` to the display."""
        self._plot(step, metrics)
        self._console.evaluated(step, lines)

    def rewind(self, step: int) -> None:
        """The steps after `step` are done again: the record and the display forget them."""
        self._record.rewind(step)
        for sink in tuple(self._plotted):
            self._without(sink, functools.partial(sink.rewind, step))
        self._console.rewind(step)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._console.close)
            for sink in self._plotted:
                stack.callback(self._without, sink, sink.close)
            stack.callback(self._record.close)

    def _plot(self, step: int, metrics: Sequence[Metric]) -> None:
        for sink in tuple(self._plotted):
            self._without(sink, functools.partial(sink.log, step, metrics))

    def _without(self, sink: Sink, call: Callable[[], None]) -> None:
        """`call` the sink; the run goes on without one that lost whom it writes to."""
        try:
            call()
        except ConnectionError as e:
            self._console.note(str(e))
            self._plotted.remove(sink)


def open_sinks(
    config: Config, folder: Path, restored_step: int, quiet: bool, console: Console, *, written: Section | None = None
) -> Sinks:
    """The sinks `[logging]` asks for, in the run's `folder`, which exists.

    `written`: the configuration as wandb shows it; None: `config`. `restored_step`: steps done before this start; what
    was logged beyond it is cut.

    Raises:
        UserError: a damaged metrics file, or wandb refuses to start.
    """
    shown = (written or config).model_dump(mode="json")
    record = jsonl.JsonlSink(folder / jsonl.FILE, restored_step)
    others: list[Sink] = []
    with contextlib.ExitStack() as opened:
        opened.callback(record.close)
        if config.logging.tensorboard:
            events = tensorboard.TensorBoardSink(folder / tensorboard.FOLDER, restored_step)
            opened.callback(events.close)
            others.append(events)
        if config.logging.prometheus_port:
            served = prometheus.PrometheusSink(config.logging, config.run.name, config.run.steps)
            opened.callback(served.close)
            others.append(served)
        if config.logging.wandb != "disabled":
            from stare_megatron.metrics import wandb

            others.append(wandb.WandbSink(folder / wandb.FOLDER, config.logging, config.run.name, shown))
        opened.pop_all()
    display = ConsoleSink(
        console,
        folder,
        config.run.steps,
        restored_step,
        config.algorithm.kind.seeks_target,
        quiet,
        history=jsonl.read(folder / jsonl.FILE),
        settings=Settings.of(flatten(config.model_dump(mode="json"))),
    )
    return Sinks(display, record, others)
