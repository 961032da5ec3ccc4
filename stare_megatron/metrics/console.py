"""What the user watches: a live display in a terminal, a plain line a step elsewhere and with `--quiet`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stare_megatron.metrics.advice import Settings, advise
from stare_megatron.metrics.catalogue import Metric, by_name

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPEED = {"throughput/tokens_per_second", "time/step"}
_PHASES = ("rollout", "score", "update", "push", "save", "eval")


@dataclass(frozen=True)
class Spark:
    """A sparkline as wide as there is room, or values, behind a `prefix`; for a rich table."""

    values: Sequence[float]
    style: str = ""
    prefix: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - len(self.prefix))
        yield Text(self.prefix + sparkline(self.values, width), style=self.style, no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        most = len(self.prefix) + len(self.values)
        return Measurement(1, most).with_maximum(options.max_width)


class ConsoleSink:
    """Progress of a run. `status` says what is going on now; `log` adds a finished step.

    Without a terminal, or when `quiet`, each step is one line of text and each status but the phases of a step too.

    Args:
        folder: the run's. total: steps of the whole run. restored_step: steps done before this start.
        has_target: the method seeks a target entropy, H_tgt. settings: what advice depends on.
    """

    def __init__(
        self,
        console: Console,
        folder: Path,
        total: int,
        restored_step: int,
        has_target: bool,
        quiet: bool,
        history: Sequence[dict[str, float]] = (),
        settings: Settings | None = None,
    ) -> None:
        self._console = console
        self._folder = folder
        self._total = total
        self._first = self._step = restored_step
        self._has_target = has_target
        self._rows = list(history)
        self._settings = settings or Settings()
        self._said: set[str] = set()  # topics of advice, where each is a line that stays
        self._status = ""
        self._evaluation: list[str] = []
        self._sample = ""
        self._began = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal and not quiet:
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, redirect_stderr=False)
            self._live.start()

    def status(self, text: str) -> None:
        """What is going on now, e.g. `starting engines` or the name of a phase."""
        self._status = text
        if self._live is None and text and text not in _PHASES:
            self._print(text)

    def note(self, text: str) -> None:
        """Something the user should know; it stays on the screen."""
        self._print(f"note: {text}")

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        row = by_name(metrics)
        self._step = step
        self._rows.append(row)
        if self._live is None:
            self._print(plain_line(step, self._total, row, self._has_target))
            for advice in advise(self._rows, self._settings):
                if advice.topic not in self._said:
                    self._print(f"advice: {advice.text}")
                self._said.add(advice.topic)

    def amend(self, metrics: Sequence[Metric]) -> None:
        """Replace values of the newest step."""
        self._rows[-1] |= by_name(metrics)

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`."""
        self._rows, self._step = self._rows[:step], step

    def evaluated(self, step: int, lines: Sequence[str]) -> None:
        """Show an evaluation of the policy of `step`; a live display keeps the newest."""
        self._evaluation = [f"step {step}: {line}" for line in lines]
        if self._live is None:
            for line in self._evaluation:
                self._print(f"eval {line}")

    def sample(self, text: str) -> None:
        """A sampled trajectory in one line, for a live display."""
        self._sample = text

    def close(self) -> None:
        self._status = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for style in ("dim", "", ""):
            table.add_column(style=style)
        if self._rows:
            self._add_curves(table)
            self._add_costs(table)
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            f"step {self._step}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=self._step),
            self._times(),
        )
        lines = [f"eval {line}" for line in self._evaluation]
        if self._sample:
            lines.append(f"sample {self._sample}")
        advice = [f"advice {found.text}" for found in advise(self._rows, self._settings)]
        saved = last_checkpoint(self._folder)
        kept = f"{self._folder}, last checkpoint {saved.name}" if saved else f"{self._folder}, no checkpoint yet"
        now = f"now: {self._status}" if self._status else ""
        return Panel(
            Group(
                bar,
                table,
                *(Text(line, overflow="fold") for line in lines),
                *(Text(line, overflow="fold", style="yellow") for line in advice),
                *(Text(line, overflow="fold", style="dim") for line in (kept, now)),
            ),
            title=f"stare-megatron {self._folder.name}",
            title_align="left",
            border_style="dim",
        )

    def _times(self) -> str:
        spent = time.monotonic() - self._began
        done = self._step - self._first
        if not done:
            return clock(spent)
        recent = [row["time/step"] for row in self._rows[-20:] if "time/step" in row]
        each = sum(recent) / len(recent) if recent else spent / done
        return f"{clock(spent)}, {clock(each * (self._total - self._step))} left"

    def _speed(self) -> float:
        """Tokens by time of the newest steps; NaN without one. In a stream no group may have finished in a step, and
        tokens count where their group finishes."""
        steps = [
            (row["throughput/tokens_per_second"], row["time/step"]) for row in self._rows[-10:] if row.keys() >= _SPEED
        ]
        seconds = sum(each for _, each in steps)
        return sum(rate * each for rate, each in steps) / seconds if seconds else math.nan

    def _add_curves(self, table: Table) -> None:
        row = self._rows[-1]
        curves = (
            ("reward", "reward/mean", "{:.3f}", "green"),
            ("correct", "reward/correct", "{:.1%}", "green"),
            ("entropy", "policy/entropy", "{:.3f}", "cyan"),
            ("response", "response/length_mean", "{:.0f} tokens", "blue"),
            ("loss", "update/loss", "{:.4f}", "green"),
            ("grad norm", "update/grad_norm", "{:.3f}", "magenta"),
        )
        supervised = "sft/sequences" in row
        for label, name, form, style in curves:
            values = [row[name] for row in self._rows if name in row]
            if (supervised and not values) or (label == "loss" and not supervised):  # in `train` it is near 0
                continue
            # Means of a batch are noisy: the last ten steps of what is a mean over prompts. Else the newest value: in a
            # stream no group may have finished in a step.
            shown = mean(self._rows[-10:], name) if name.startswith("reward/") else (values or [math.nan])[-1]
            table.add_row(label, form.format(shown), Spark(values, style))
            if name == "policy/entropy" and self._has_target:
                gate = "open" if row.get("stare/gate") else "closed"
                table.add_row("target", f"{row.get('policy/target_entropy', math.nan):.3f}", f"gate {gate}")

    def _add_costs(self, table: Table) -> None:
        row = self._rows[-1]
        phases = "  ".join(f"{p} {row[f'time/{p}']:.1f}" for p in _PHASES if row.get(f"time/{p}"))
        speed = f"{self._speed():,.0f} tokens/s"
        table.add_row("speed", speed, Text(f"{phases} s", style="dim"))
        if "sft/sequences" in row:
            return
        mismatch = f"{row.get('mismatch/mean', math.nan):.1e} nats"
        table.add_row(
            "mismatch", mismatch, Text(f"engine vs trainer, max {row.get('mismatch/max', math.nan):.1e}", style="dim")
        )
        for label, text in work_lines(row, self._settings):
            table.add_row(label, *(Text(part, style=style) for part, style in zip(text, ("", "dim"), strict=True)))


def work_lines(row: Mapping[str, float], settings: Settings) -> list[tuple[str, tuple[str, str]]]:
    """What there is to say of engines, queue and staleness in a step, as label and two parts; nothing where it is as
    always: one policy, no queue, every engine well."""
    lines = []
    if settings.engines > 1 or row.get("fleet/restarts") or row.get("fleet/healthy", 1.0) < settings.engines:
        healthy = f"{row.get('fleet/healthy', math.nan):.0f} of {settings.engines}"
        idle = f"engines idle {row.get('idle/engines', math.nan):.0%}, ranks {row.get('idle/trainers', math.nan):.0%}"
        again = f", {row['fleet/restarts']:.0f} started again" if row.get("fleet/restarts") else ""
        lines.append(("engines", (healthy, idle + again)))
    if settings.mode == "stream":
        ready = f"{row.get('queue/ready', math.nan):.0f} finished ones wait"
        lines.append(("queue", (f"{row.get('queue/running', math.nan):.0f} groups", ready)))
    if settings.mode != "sync":
        p95, most = row.get("sync/staleness_p95", math.nan), row.get("sync/staleness", math.nan)
        parts = (
            f"{row.get('sync/staleness_mean', math.nan):.2f} versions",
            f"95 % at most {p95:.0f}, the oldest {most:.0f}",
        )
        lines.append(("staleness", (parts[0], f"{parts[1]} of {settings.oldest}")))
    return lines


def plain_line(step: int, total: int, row: dict[str, float], has_target: bool) -> str:
    """One step as one line of text; values that were not measured are left out."""
    parts = [f"step {step}/{total}"]

    def add(name: str, form: str) -> None:
        if name in row:
            parts.append(form.format(row[name]))

    add("reward/mean", "reward {:.3f}")
    add("policy/entropy", "entropy {:.3f}")
    if has_target:
        add("policy/target_entropy", "target {:.3f}")
        add("stare/gate", "gate {:.0f}")
        add("stare/weight_pos", "W {:.2f}")
    add("response/length_mean", "length {:.1f}")
    add("update/loss", "loss {:+.4f}")
    add("update/grad_norm", "grad {:.3f}")
    add("mismatch/mean", "mismatch {:.1e}")
    if row.get("sync/staleness"):
        add("sync/staleness_mean", "stale {:.2f}")
    if row.get("fleet/restarts"):
        add("fleet/healthy", "engines {:.0f}")
    add("throughput/tokens_per_second", "{:.0f} tokens/s")
    add("time/step", "{:.1f} s")
    return "  ".join(parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as at most `width` block characters, between their own minimum and maximum; `?` for a non-finite one.

    More values than characters are averaged in equal runs.
    """
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        pieces = [values[a:b] for a, b in itertools.pairwise(edges)]
        values = [sum(piece) / len(piece) for piece in pieces]
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] if math.isfinite(v) else "?" for v in values)


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Mean of a metric over the steps that have it; NaN without one."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else math.nan


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None before there is one. Of two of a step that in the run's folder."""
    roots = (folder / "checkpoints", folder / "checkpoints/local")
    found = [root / latest.read_text().strip() for root in roots if (latest := root / "latest").is_file()]
    return max(found, key=lambda folder: int(folder.name.removeprefix("step_")), default=None)
