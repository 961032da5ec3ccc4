"""The curves of one run as a picture: `curves.png` in the run's folder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stare_megatron.host.files import PARTIAL
from stare_megatron.metrics import eval_records, jsonl
from stare_megatron.metrics.estimators import moving_average

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "curves.png"

_BLUE, _GREEN, _ORANGE, _GREY, _RED, _GATE = "#2f6db5", "#2e8b57", "#d9822b", "#8a8f98", "#c0392b", "#f6dfb8"
# Quadrants of advantage and surprisal: full where a step lowers the entropy, light where it raises it.
QUADRANT_COLOURS = {"pos_likely": _BLUE, "pos_unlikely": "#9cc3ea", "neg_likely": "#f2b98a", "neg_unlikely": _RED}
_WIDTH = 10  # steps of a running mean in the panels of the dynamics

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b8bcc2",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "grid.color": "#eceef0",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def plot(run_folder: Path) -> Path:
    """Draw entropy with its target and gate, reward, response length, gate duty, mismatch and phase times; and the
    entropy dynamics: quadrants by tokens and by predicted change, predicted against measured change. Of supervised
    training loss, entropy, gradient norm, learning rate, speed and phase times.

    Reads `metrics.jsonl`, and for the held-out loss `eval.jsonl`. Returns the PNG, which is replaced whole.

    Raises:
        UserError: no metrics file, a damaged one, or no step in it.
    """
    rows = jsonl.read_steps(run_folder / jsonl.FILE)
    supervised = "sft/sequences" in rows[-1]
    table = run_folder / eval_records.TABLE
    held_out = jsonl.read(table) if supervised and table.is_file() else []
    # Without a display, and without touching the caller's pyplot state.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        panels = _SUPERVISED if supervised else _PANELS
        lines = len(panels) // 3
        figure = Figure(figsize=(12, 3.1 * lines), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, 3, sharex=True)
        for (title, unit, draw), ax in zip(panels, axes.flat, strict=True):
            ax.set_title(title)
            ax.set_ylabel(unit)
            draw(ax, rows + held_out if draw is _loss else rows)
            if ax.get_legend() is None and ax.get_legend_handles_labels()[0]:
                ax.legend(loc="best")
        for ax in axes[-1]:
            ax.set_xlabel("step")
        last = int(rows[-1]["step"])
        figure.suptitle(f"{run_folder.resolve().name}, {last} steps", x=0.01, ha="left", fontsize=12)
        return save_png(figure, run_folder / FILE)


def save_png(figure: Figure, file: Path, **options: Any) -> Path:
    """Write a figure, replacing the file whole; returns the file."""
    partial = file.with_name(file.name + PARTIAL)
    figure.savefig(partial, format="png", **options)
    os.replace(partial, file)
    return file


def _series(rows: list[jsonl.Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values where `name` was logged."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _averaged(values: Sequence[float], width: int) -> np.ndarray:
    return moving_average(np.array(values, np.float64), width)


def _smooth(ax: Axes, rows: list[jsonl.Row], name: str, colour: str, label: str) -> None:
    steps, values = _series(rows, name)
    ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
    ax.plot(steps, _averaged(values, 10), color=colour, linewidth=1.8, label=label)


def _entropy(ax: Axes, rows: list[jsonl.Row]) -> None:
    for step in (row["step"] for row in rows if row.get("stare/gate")):
        ax.axvspan(step - 0.5, step + 0.5, color=_GATE, linewidth=0, zorder=0)
    ax.plot(*_series(rows, "policy/entropy"), color=_BLUE, linewidth=1.6, label="policy")
    steps, target = _series(rows, "policy/target_entropy")
    if target:
        ax.plot(steps, target, color=_RED, linewidth=1.2, linestyle="--", label="target")
    if any(_series(rows, "stare/gate")[1]):
        ax.fill_between([], [], [], color=_GATE, label="gate open")
    ax.set_ylim(bottom=0)


def _reward(ax: Axes, rows: list[jsonl.Row]) -> None:
    _smooth(ax, rows, "reward/mean", _GREEN, "mean of 10 steps")


def _length(ax: Axes, rows: list[jsonl.Row]) -> None:
    _smooth(ax, rows, "response/length_mean", _BLUE, "mean")
    steps, longest = _series(rows, "response/length_max")
    if longest:
        ax.plot(steps, longest, color=_GREY, linewidth=0.9, label="longest")
    ax.set_ylim(bottom=0)


def _gate_duty(ax: Axes, rows: list[jsonl.Row]) -> None:
    steps, gates = _series(rows, "stare/gate")
    if not gates:
        ax.text(0.5, 0.5, "no gate in this run", transform=ax.transAxes, ha="center", color=_GREY)
    duty = _averaged(gates, 20)
    ax.fill_between(steps, duty, color=_GATE, linewidth=0)
    ax.plot(steps, duty, color=_ORANGE, linewidth=1.6)
    ax.set_ylim(0, 1.02)


def _mismatch(ax: Axes, rows: list[jsonl.Row]) -> None:
    lines = (("mismatch/max", _GREY, "largest"), ("mismatch/mean", _BLUE, "mean"), ("sync/probe", _ORANGE, "probe"))
    positive = False
    for name, colour, label in lines:
        steps, values = _series(rows, name)
        positive = positive or any(v > 0 for v in values)
        ax.plot(steps, values, color=colour, linewidth=1.1, label=label)
    if positive:
        ax.set_yscale("log")


def _times(ax: Axes, rows: list[jsonl.Row]) -> None:
    names = ("rollout", "score", "update", "push", "save", "eval")
    steps = [row["step"] for row in rows]
    stacked = [[row.get(f"time/{name}", 0.0) for row in rows] for name in names]
    colours = (_BLUE, "#7fa8d6", _GREEN, _ORANGE, _GREY, _GATE)
    ax.stackplot(steps, *stacked, labels=names, colors=colours, linewidth=0)
    # Room for the legend above the stack.
    ax.set_ylim(0, 1.35 * max(sum(phases) for phases in zip(*stacked, strict=True)) or 1.0)
    ax.legend(loc="upper right", ncols=3)


def scaled_to(values: Sequence[float], like: Sequence[float]) -> tuple[float, float]:
    """(factor, correlation) of two series over the places where both are finite: `values` x factor has the root mean
    square of `like`. Correlation about 0, not about the means, since both are changes; NaN without a common value.
    """
    pairs = [(a, b) for a, b in zip(values, like, strict=True) if math.isfinite(a) and math.isfinite(b)]
    ours, theirs = math.hypot(*(a for a, _ in pairs)), math.hypot(*(b for _, b in pairs))
    if ours == 0 or theirs == 0:
        return math.nan, math.nan
    return theirs / ours, math.fsum(a * b for a, b in pairs) / (ours * theirs)


def _with_dynamics(ax: Axes, rows: list[jsonl.Row]) -> list[jsonl.Row]:
    """The rows that have the dynamics, or none and a note of it."""
    found = [row for row in rows if "dynamics/measured_change" in row]
    if not found:
        ax.text(0.5, 0.5, "not logged by this run", transform=ax.transAxes, ha="center", color=_GREY)
    return found


def _quadrant_means(rows: list[jsonl.Row], kind: str) -> dict[str, np.ndarray]:
    names = {q: f"dynamics/{kind}_{q}" for q in QUADRANT_COLOURS}
    return {q: _averaged([row.get(name, math.nan) for row in rows], _WIDTH) for q, name in names.items()}


def _tokens(ax: Axes, rows: list[jsonl.Row]) -> None:
    rows = _with_dynamics(ax, rows)
    if not rows:
        return
    shares = _quadrant_means(rows, "tokens")
    labels = [q.replace("_", ", ") for q in shares]
    colours = [QUADRANT_COLOURS[q] for q in shares]
    ax.stackplot([row["step"] for row in rows], *shares.values(), labels=labels, colors=colours, linewidth=0)
    ax.set_ylim(0, 1.3)  # room for the legend above the stack
    ax.legend(loc="upper right", ncols=2)


def _change(ax: Axes, rows: list[jsonl.Row]) -> None:
    rows = _with_dynamics(ax, rows)
    steps = [row["step"] for row in rows]
    for q, share in _quadrant_means(rows, "change").items() if rows else ():
        ax.plot(steps, share, color=QUADRANT_COLOURS[q], linewidth=1.6, label=q.replace("_", ", "))
    ax.axhline(0.0, color=_GREY, linewidth=0.8)
    if rows:
        ax.legend(loc="best", ncols=2)


def _prediction(ax: Axes, rows: list[jsonl.Row]) -> None:
    rows = _with_dynamics(ax, rows)
    ax.axhline(0.0, color=_GREY, linewidth=0.8)
    if not rows:
        return
    steps = [row["step"] for row in rows]
    measured = [row["dynamics/measured_change"] for row in rows]
    predicted = [row.get("dynamics/predicted_change_before", math.nan) for row in rows]
    whole = slice(_WIDTH if len(rows) > 2 * _WIDTH else 0, None)  # a mean of few steps is mostly sampling noise
    means = [_averaged(values, _WIDTH)[whole] for values in (measured, predicted)]
    factor, correlation = scaled_to(means[1].tolist(), means[0].tolist())
    ax.plot(steps, measured, color=_BLUE, alpha=0.25, linewidth=0.8)
    ax.plot(steps[whole], means[0], color=_BLUE, linewidth=1.8, label=f"measured, mean of {_WIDTH} steps")
    if math.isfinite(factor):
        note = f"predicted x {factor:.2g}, mean of {_WIDTH} steps; r = {correlation:.2f}"
        ax.plot(steps[whole], factor * means[1], color=_ORANGE, linewidth=1.6, label=note)


# Title, unit and drawing function of each panel.
_PANELS = (
    ("Entropy", "nats / token", _entropy),
    ("Reward", "mean of sampled trajectories", _reward),
    ("Response length", "tokens", _length),
    ("Gate", "share of steps open (last 20)", _gate_duty),
    ("Engine against trainer", "|log-prob difference|, nats", _mismatch),
    ("Time a step", "seconds", _times),
    ("Quadrants: tokens", f"share, mean of {_WIDTH} steps", _tokens),
    ("Quadrants: predicted entropy change", f"signed share, mean of {_WIDTH} steps", _change),
    ("Entropy change by one update", "nats / token", _prediction),
)


def _loss(ax: Axes, rows: list[jsonl.Row]) -> None:
    _smooth(ax, rows, "update/loss", _BLUE, "training, mean of 10 steps")
    steps, held_out = _series(rows, "sft/held_out_loss")
    if steps:
        ax.plot(steps, held_out, color=_ORANGE, linewidth=1.6, marker="o", markersize=3, label="held out")


def _line(name: str, colour: str) -> Callable[[Axes, list[jsonl.Row]], None]:
    def draw(ax: Axes, rows: list[jsonl.Row]) -> None:
        ax.plot(*_series(rows, name), color=colour, linewidth=1.4)

    return draw


_SUPERVISED = (
    ("Loss", "nats / learned token", _loss),
    ("Entropy", "nats / learned token", _entropy),
    ("Gradient norm", "before clipping", _line("update/grad_norm", _GREEN)),
    ("Learning rate", "", _line("update/lr", _GREY)),
    ("Speed", "tokens / s", _line("throughput/tokens_per_second", _BLUE)),
    ("Time a step", "seconds", _times),
)
