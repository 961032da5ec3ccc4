"""The curves of one run as a picture: `curves.png` in the run's folder."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stare_megatron.errors import UserError
from stare_megatron.metrics import jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "curves.png"

_BLUE, _GREEN, _ORANGE, _GREY, _RED, _GATE = "#2f6db5", "#2e8b57", "#d9822b", "#8a8f98", "#c0392b", "#f6dfb8"
# Quadrants of advantage and surprisal: full where a step lowers the entropy, light where it raises it.
QUADRANT_COLOURS = {
    "pos_likely": _BLUE,
    "pos_unlikely": "#9cc3ea",
    "neg_likely": "#f2b98a",
    "neg_unlikely": _RED,
}
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
    entropy dynamics: quadrants by tokens and by predicted change, predicted against measured change.

    Reads `metrics.jsonl` only. Returns the PNG, which is replaced whole.

    Raises:
        UserError: no metrics file, a damaged one, or no step in it.
    """
    rows = jsonl.read(run_folder / jsonl.FILE)
    if not rows:
        raise UserError(f"{run_folder / jsonl.FILE}: no step was logged yet, nothing to draw")
    # Without a display, and without touching the caller's pyplot state.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (_entropy, _reward, _length, _gate_duty, _mismatch, _times, _tokens, _change, _prediction)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 9.3), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(3, 3, sharex=True)
        for draw, ax in zip(panels, axes.flat, strict=True):
            draw(ax, rows)
        for ax in axes[-1]:
            ax.set_xlabel("step")
        last = int(rows[-1]["step"])
        figure.suptitle(f"{run_folder.resolve().name}, {last} steps", x=0.01, ha="left", fontsize=12)
        file = run_folder / FILE
        partial = file.with_name(FILE + ".partial")
        figure.savefig(partial, format="png")
    os.replace(partial, file)
    return file


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each position; non-finite ones are left out."""
    means = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i + 1 - width) : i + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _series(rows: list[jsonl.Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values where `name` was logged."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(ax: Axes, rows: list[jsonl.Row], name: str, colour: str, label: str) -> None:
    steps, values = _series(rows, name)
    ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
    ax.plot(steps, running_mean(values, 10), color=colour, linewidth=1.8, label=label)


def _entropy(ax: Axes, rows: list[jsonl.Row]) -> None:
    ax.set_title("Entropy")
    ax.set_ylabel("nats / token")
    _, gates = _series(rows, "stare/gate")
    for step in (row["step"] for row in rows if row.get("stare/gate")):
        ax.axvspan(step - 0.5, step + 0.5, color=_GATE, linewidth=0, zorder=0)
    steps, values = _series(rows, "policy/entropy")
    ax.plot(steps, values, color=_BLUE, linewidth=1.6, label="policy")
    steps, target = _series(rows, "policy/target_entropy")
    if target:
        ax.plot(steps, target, color=_RED, linewidth=1.2, linestyle="--", label="target")
    if any(gates):
        ax.fill_between([], [], [], color=_GATE, label="gate open")
    ax.set_ylim(bottom=0)
    ax.legend(loc="best")


def _reward(ax: Axes, rows: list[jsonl.Row]) -> None:
    ax.set_title("Reward")
    ax.set_ylabel("mean of sampled trajectories")
    _smooth(ax, rows, "reward/mean", _GREEN, "mean of 10 steps")
    ax.legend(loc="best")


def _length(ax: Axes, rows: list[jsonl.Row]) -> None:
    ax.set_title("Response length")
    ax.set_ylabel("tokens")
    _smooth(ax, rows, "response/length_mean", _BLUE, "mean")
    steps, longest = _series(rows, "response/length_max")
    if longest:
        ax.plot(steps, longest, color=_GREY, linewidth=0.9, label="longest")
    ax.set_ylim(bottom=0)
    ax.legend(loc="best")


def _gate_duty(ax: Axes, rows: list[jsonl.Row]) -> None:
    ax.set_title("Gate")
    ax.set_ylabel("share of steps open (last 20)")
    steps, gates = _series(rows, "stare/gate")
    if not gates:
        ax.text(0.5, 0.5, "no gate in this run", transform=ax.transAxes, ha="center", color=_GREY)
    ax.fill_between(steps, running_mean(gates, 20), color=_GATE, linewidth=0)
    ax.plot(steps, running_mean(gates, 20), color=_ORANGE, linewidth=1.6)
    ax.set_ylim(0, 1.02)


def _mismatch(ax: Axes, rows: list[jsonl.Row]) -> None:
    ax.set_title("Engine against trainer")
    ax.set_ylabel("|log-prob difference|, nats")
    lines = (("mismatch/max", _GREY, "largest"), ("mismatch/mean", _BLUE, "mean"), ("sync/probe", _ORANGE, "probe"))
    positive = False
    for name, colour, label in lines:
        steps, values = _series(rows, name)
        positive = positive or any(v > 0 for v in values)
        ax.plot(steps, values, color=colour, linewidth=1.1, label=label)
    if positive:
        ax.set_yscale("log")
    ax.legend(loc="best")


def _times(ax: Axes, rows: list[jsonl.Row]) -> None:
    ax.set_title("Time a step")
    ax.set_ylabel("seconds")
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


def _with_dynamics(ax: Axes, rows: list[jsonl.Row], title: str, ylabel: str) -> list[jsonl.Row]:
    """Label the panel; the rows that have the dynamics, or none and a note of it."""
    ax.set_title(title)
    ax.set_ylabel(ylabel)
    found = [row for row in rows if "dynamics/measured_change" in row]
    if not found:
        ax.text(0.5, 0.5, "not logged by this run", transform=ax.transAxes, ha="center", color=_GREY)
    return found


def _quadrant_means(rows: list[jsonl.Row], kind: str) -> dict[str, list[float]]:
    names = {q: f"dynamics/{kind}_{q}" for q in QUADRANT_COLOURS}
    return {q: running_mean([row.get(name, math.nan) for row in rows], _WIDTH) for q, name in names.items()}


def _tokens(ax: Axes, rows: list[jsonl.Row]) -> None:
    rows = _with_dynamics(ax, rows, "Quadrants: tokens", f"share, mean of {_WIDTH} steps")
    if not rows:
        return
    shares = _quadrant_means(rows, "tokens")
    labels = [q.replace("_", ", ") for q in shares]
    colours = [QUADRANT_COLOURS[q] for q in shares]
    ax.stackplot([row["step"] for row in rows], *shares.values(), labels=labels, colors=colours, linewidth=0)
    ax.set_ylim(0, 1.3)  # room for the legend above the stack
    ax.legend(loc="upper right", ncols=2)


def _change(ax: Axes, rows: list[jsonl.Row]) -> None:
    rows = _with_dynamics(ax, rows, "Quadrants: predicted entropy change", f"signed share, mean of {_WIDTH} steps")
    for q, share in _quadrant_means(rows, "change").items():
        ax.plot(
            [row["step"] for row in rows], share, color=QUADRANT_COLOURS[q], linewidth=1.6, label=q.replace("_", ", ")
        )
    ax.axhline(0.0, color=_GREY, linewidth=0.8)
    if rows:
        ax.legend(loc="best", ncols=2)


def _prediction(ax: Axes, rows: list[jsonl.Row]) -> None:
    rows = _with_dynamics(ax, rows, "Entropy change by one update", "nats / token")
    ax.axhline(0.0, color=_GREY, linewidth=0.8)
    if not rows:
        return
    steps = [row["step"] for row in rows]
    measured = [row["dynamics/measured_change"] for row in rows]
    predicted = [row.get("dynamics/predicted_change_before", math.nan) for row in rows]
    whole = slice(_WIDTH if len(rows) > 2 * _WIDTH else 0, None)  # a mean of few steps is mostly sampling noise
    means = [running_mean(values, _WIDTH)[whole] for values in (measured, predicted)]
    factor, correlation = scaled_to(means[1], means[0])
    ax.plot(steps, measured, color=_BLUE, alpha=0.25, linewidth=0.8)
    ax.plot(steps[whole], means[0], color=_BLUE, linewidth=1.8, label=f"measured, mean of {_WIDTH} steps")
    if math.isfinite(factor):
        note = f"predicted x {factor:.2g}, mean of {_WIDTH} steps; r = {correlation:.2f}"
        ax.plot(steps[whole], [factor * value for value in means[1]], color=_ORANGE, linewidth=1.6, label=note)
    ax.legend(loc="best")
