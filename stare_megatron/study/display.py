"""What the user of a study watches: a live table in a terminal; elsewhere a line when a run changes state, and now and
then one of them all."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from stare_megatron.metrics.console import Spark, clock
from stare_megatron.study.jobs import Progress, State

_STYLES = {
    State.WAITING: "dim",
    State.RUNNING: "bold",
    State.STOPPING: "yellow",
    State.DONE: "green",
    State.FAILED: "red",
    State.STOPPED: "yellow",
}
_CURVE = 30  # columns of a value and its sparkline
_EVERY = 60.0  # seconds between lines of progress without a terminal


class Display:
    """Shows progress; a context manager. `show` may be called as often as one likes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=2) if console.is_terminal else None
        self._said: dict[str, State] = {}
        self._last = time.monotonic()

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: list[Progress]) -> None:
        if self._live is not None:
            self._live.update(table(progress))
            return
        for p in progress:
            if p.state is not self._said.get(p.job.name, State.WAITING):
                self._said[p.job.name] = p.state
                self._print(line(p))
        if time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            running = [line(p) for p in progress if p.state is State.RUNNING]
            done = sum(p.state is State.DONE for p in progress)
            self._print(f"{done} of {len(progress)} done; " + "; ".join(running))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def line(p: Progress) -> str:
    """One run in one line of text."""
    text = f"{p.job.name}: {p.state.value}, step {p.step}/{p.steps}"
    if p.rows:
        text += f", entropy {_last(p, 'policy/entropy'):.3f}, reward {_last(p, 'reward/mean'):.3f}"
    return f"{text}: {p.note}" if p.note else text


def table(progress: list[Progress]) -> Table:
    """All runs, one a row."""
    found = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("run", "", "step"):
        found.add_column(name, no_wrap=True)
    for name in ("entropy", "reward"):
        found.add_column(name, max_width=_CURVE)
    found.add_column("left", justify="right", no_wrap=True)
    for p in progress:
        found.add_row(
            p.job.name,
            p.note or p.state.value,
            f"{p.step}/{p.steps}",
            _curve(p, "policy/entropy"),
            _curve(p, "reward/mean"),
            _time_left(p),
            style=_STYLES[p.state],
        )
    return found


def _curve(p: Progress, name: str) -> Spark:
    values = [row[name] for row in p.rows if name in row]
    return Spark(values, prefix=f"{values[-1]:.3f} " if values else "")


def _last(p: Progress, name: str) -> float:
    return next((row[name] for row in reversed(p.rows) if name in row), math.nan)


def _time_left(p: Progress) -> str:
    done = p.step - p.steps_before
    if p.state is not State.RUNNING or done < 1:
        return ""
    recent = [row["time/step"] for row in p.rows[-20:] if "time/step" in row]
    return clock(sum(recent) / len(recent) * (p.steps - p.step)) if recent else ""
