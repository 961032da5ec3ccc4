"""What the user watches: a live display in a terminal, a plain line a step elsewhere and with `--quiet`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stare_megatron.metrics.catalogue import Metric, by_name

_BLOCKS = "▁▂▃▄▅▆▇█"
_PHASES = ("rollout", "score", "update", "push", "save", "eval")
_SPARK_WIDTH = 40


class ConsoleSink:
    """Progress of a run. `status` says what is going on now; `log` adds a finished step.

    Without a terminal, or when `quiet`, each step is one line of text and each status but the phases of a step too.

    Args:
        total: steps of the whole run. restored_step: steps done before this start.
        has_target: the method seeks a target entropy, H_tgt.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        total: int,
        restored_step: int,
        has_target: bool,
        quiet: bool,
        history: Sequence[dict[str, float]] = (),
    ) -> None:
        self._console = console
        self._name = name
        self._total = total
        self._first = self._step = restored_step
        self._has_target = has_target
        self._rows = list(history)
        self._status = ""
        self._evaluation: list[str] = []
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

    def amend(self, metrics: Sequence[Metric]) -> None:
        """Replace values of the newest step."""
        self._rows[-1] |= by_name(metrics)

    def evaluated(self, step: int, lines: Sequence[str]) -> None:
        """Show an evaluation of the policy of `step`; a live display keeps the newest."""
        self._evaluation = [f"step {step}: {line}" for line in lines]
        if self._live is None:
            for line in self._evaluation:
                self._print(f"eval {line}")

    def close(self) -> None:
        self._status = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "left", "left"):
            table.add_column(justify=justify)
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
        now = Text(f"now: {self._status}" if self._status else "", style="dim")
        return Panel(
            Group(bar, table, *(Text(f"eval {line}", overflow="fold") for line in self._evaluation), now),
            title=f"stare-megatron {self._name}",
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

    def _add_curves(self, table: Table) -> None:
        row = self._rows[-1]
        table.add_row("reward", f"{_mean(self._rows[-10:], 'reward/mean'):.3f}", self._spark("reward/mean", "green"))
        entropy = f"{row.get('policy/entropy', math.nan):.3f}"
        if self._has_target:
            gate = "open" if row.get("stare/gate") else "shut"
            entropy += f" target {row.get('policy/target_entropy', math.nan):.3f}, gate {gate}"
        table.add_row("entropy", entropy, self._spark("policy/entropy", "cyan"))
        length = f"{row.get('response/length_mean', math.nan):.0f} tokens"
        table.add_row("response", length, self._spark("response/length_mean", "blue"))

    def _add_costs(self, table: Table) -> None:
        row = self._rows[-1]
        phases = "  ".join(f"{p} {row[f'time/{p}']:.1f}" for p in _PHASES if row.get(f"time/{p}"))
        speed = f"{row.get('throughput/tokens_per_second', math.nan):,.0f} tokens/s"
        table.add_row("speed", speed, Text(f"{phases} s", style="dim"))
        mismatch = f"{row.get('mismatch/mean', math.nan):.1e} nats"
        table.add_row("engine vs trainer", mismatch, Text(f"max {row.get('mismatch/max', math.nan):.1e}", style="dim"))

    def _spark(self, name: str, style: str) -> Text:
        return Text(sparkline([row[name] for row in self._rows if name in row], _SPARK_WIDTH), style=style)


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


def _mean(rows: Sequence[dict[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else math.nan
