"""The newest values for a Prometheus server, which asks for them: `http://HOST:PORT/metrics`.

The text format is Prometheus's "exposition format", version 0.0.4; all metrics are gauges. Names are those of the
catalogue with `_` for what Prometheus does not take, behind `stare_megatron_`; one of a family has the label `name`,
since two of them may be written alike.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterable, Sequence

from stare_megatron.config import LoggingConfig
from stare_megatron.errors import UserError
from stare_megatron.host.pages import Answer, Page, PageServer, not_found
from stare_megatron.metrics.catalogue import CATALOGUE, Metric, entry
from stare_megatron.metrics.samples import SampleRow

PATH = "/metrics"
_PREFIX = "stare_megatron_"
_KEPT = "eval/"  # what is not measured in each step stays as it was


class PrometheusSink:
    """Serves what was logged last.

    Args:
        logging: its port is not 0. run: name of the run, a label of every value. steps: of the whole run.

    Raises:
        UserError: the port is taken, or there is no such address.
    """

    def __init__(self, logging: LoggingConfig, run: str, steps: int) -> None:
        self._run = run
        self._steps = steps
        self._lock = threading.Lock()
        self._step = 0
        self._time = math.nan
        self._values: dict[str, Metric] = {}
        self._server = listen(logging, self._answer)
        self._server.start()

    @property
    def url(self) -> str:
        return self._server.url + PATH

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        with self._lock:
            if step != self._step:
                self._values = {name: m for name, m in self._values.items() if name.startswith(_KEPT)}
            self._step, self._time = step, time.time()
            self._values |= {m.name: m for m in metrics}

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Numbers alone are served."""

    def rewind(self, step: int) -> None:
        """Nothing to do: what is served is the newest."""

    def close(self) -> None:
        self._server.stop()

    def _answer(self, path: str) -> Page:
        if path != PATH:
            return not_found(path)
        with self._lock:
            values, step, seen = tuple(self._values.values()), self._step, self._time
        own = (("step", step, "Steps done."), ("steps", self._steps, "Steps of the whole run."))
        lines = [line for name, value, text in own for line in _gauge(name, text, [({}, value)], self._run)]
        lines += _gauge("logged", "When something was logged last, seconds since the epoch.", [({}, seen)], self._run)
        return Page("\n".join([*lines, *expose(values, self._run)]) + "\n", "text/plain; version=0.0.4")


def listen(logging: LoggingConfig, answer: Answer = not_found) -> PageServer:
    """A server where `[logging]` wants one, not started.

    Raises:
        UserError: the port is taken, or there is no such address.
    """
    try:
        return PageServer(logging.prometheus_host, logging.prometheus_port, answer)
    except OSError as e:
        raise UserError(
            f"logging.prometheus_port = {logging.prometheus_port}: cannot listen there on "
            f"{logging.prometheus_host} ({e.strerror}); choose another port, or 0 for no endpoint"
        ) from e


def expose(metrics: Iterable[Metric], run: str) -> list[str]:
    """Lines of the text format, those of a name together."""
    found: dict[str, list[Metric]] = {}
    for metric in metrics:
        found.setdefault(re.sub(r"[^a-zA-Z0-9_]", "_", metric.name), []).append(metric)
    lines = []
    for name, group in found.items():
        about = entry(group[0].name)
        values = [({} if m.name in CATALOGUE else {"name": m.name}, m.value) for m in group]
        lines += _gauge(name, f"{about.meaning} [{about.unit}]", values, run)
    return lines


def _gauge(name: str, text: str, values: Iterable[tuple[dict[str, str], float]], run: str) -> list[str]:
    name = _PREFIX + name
    lines = [f"# HELP {name} {_escaped(text)}", f"# TYPE {name} gauge"]
    for labels, value in values:
        shown = ",".join(f'{key}="{_quoted(label)}"' for key, label in ({"run": run} | labels).items())
        lines.append(f"{name}{{{shown}}} {_number(value)}")
    return lines


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(label: str) -> str:
    return _escaped(label).replace('"', '\\"')
