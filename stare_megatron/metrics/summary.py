"""A finished run on one screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table

from stare_megatron.metrics import jsonl
from stare_megatron.metrics.console import clock

_WINDOW = 10


@dataclass(frozen=True)
class Summary:
    """What a run did. `first` and `last` are means over its first and last `window` steps (all starts together).

    Entropies in nats a token; `gate_duty`: share of steps with an open gate; `mismatch_max_mean`: the largest of the
    steps' mean |trainer - engine| log-prob, nats; `seconds`: sum of the steps' times; peaks in MB, 0 if not measured.
    """

    steps: int
    window: int
    reward_first: float
    reward_last: float
    entropy_first: float
    entropy_last: float
    target_entropy: float
    gate_duty: float
    mismatch_max_mean: float
    seconds: float
    trained_tokens: float
    trainer_peak: float
    engine_peak: float


def summarize(run_folder: Path) -> Summary:
    """Read `metrics.jsonl`.

    Raises:
        UserError: no metrics file, a damaged one, or no step in it.
    """
    rows = jsonl.read_steps(run_folder / jsonl.FILE)
    window = max(1, min(_WINDOW, len(rows) // 2))
    first, last = rows[:window], rows[-window:]
    return Summary(
        steps=len(rows),
        window=window,
        reward_first=_mean(first, "reward/mean"),
        reward_last=_mean(last, "reward/mean"),
        entropy_first=_mean(first, "policy/entropy"),
        entropy_last=_mean(last, "policy/entropy"),
        target_entropy=rows[-1].get("policy/target_entropy", math.nan),
        gate_duty=_mean(rows, "stare/gate"),
        mismatch_max_mean=max((row["mismatch/mean"] for row in rows if "mismatch/mean" in row), default=math.nan),
        seconds=sum(row.get("time/step", 0.0) for row in rows),
        trained_tokens=sum(row.get("throughput/trained_tokens", 0.0) for row in rows),
        trainer_peak=max(row.get("memory/trainer_peak", 0.0) for row in rows),
        engine_peak=max(row.get("memory/engine_peak", 0.0) for row in rows),
    )


def render(summary: Summary, name: str, paths: Sequence[tuple[str, Path]]) -> RenderableType:
    """For `rich.console.Console.print`. `paths`: label and path of what the run wrote; absent ones are left out."""
    s = summary
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    # A path is cut where the terminal ends only when it must, never shortened.
    table.add_column(overflow="fold")
    change = s.reward_last - s.reward_first
    over = f"first and last {s.window} of {s.steps} steps" if s.steps > 1 else "1 step"
    table.add_row("reward", f"{s.reward_first:.3f} -> {s.reward_last:.3f} ({change:+.3f}; {over})")
    target = "" if math.isnan(s.target_entropy) else f", target {s.target_entropy:.3f}"
    table.add_row("entropy", f"{s.entropy_first:.3f} -> {s.entropy_last:.3f} nats a token{target}")
    if not math.isnan(s.gate_duty):
        table.add_row("gate", f"open in {s.gate_duty:.0%} of the steps")
    table.add_row("engine vs trainer", f"mean |log-prob difference| at most {s.mismatch_max_mean:.1e} nats")
    each = s.seconds / s.steps
    table.add_row("time", f"{clock(s.seconds)}, {each:.1f} s a step; {s.trained_tokens:,.0f} tokens trained on")
    if s.trainer_peak or s.engine_peak:
        table.add_row("peak memory", f"trainer rank {s.trainer_peak:,.0f} MB, engine {s.engine_peak:,.0f} MB")
    for label, path in paths:
        if path.exists():
            table.add_row(label, str(path))
    return Panel(table, title=f"{name}: done", title_align="left", border_style="dim")


def _mean(rows: Sequence[jsonl.Row], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else math.nan
