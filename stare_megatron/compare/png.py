"""The panels as PNGs: one each, and an overview. No display needed, and pyplot's state is left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from stare_megatron.compare import derived
from stare_megatron.compare.align import AXES, mean_curve, position
from stare_megatron.compare.group import Group
from stare_megatron.compare.html import Content
from stare_megatron.compare.page import COLOURS, PHASE_COLOURS
from stare_megatron.compare.panels import PREDICTED, Kind, Panel, panels, phases
from stare_megatron.compare.stats import TOLERANCE
from stare_megatron.metrics.estimators import moving_average
from stare_megatron.metrics.plot import STYLE, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OVERVIEW = "overview.png"
_OVERVIEW_PANELS = ("policy_entropy", "time_in_band", "reward_mean", "reward_correct", "gate_duty", "update_grad_norm")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {**STYLE, "lines.solid_capstyle": "round", "savefig.facecolor": "white"}


def write_pngs(folder: Path, content: Content) -> list[Path]:
    """Write `overview.png` and one PNG a panel; each is replaced whole. Returns the files.

    The same content gives the same bytes with the same versions of matplotlib and its fonts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = panels([run for g in content.groups for run in g.runs], content.reference)
    chosen = [panel for panel in found if panel.key in _OVERVIEW_PANELS]
    files = []
    with matplotlib.rc_context(_STYLE):
        if chosen:
            files.append(_save(folder / OVERVIEW, chosen, content))
        files += [_save(folder / f"{_file_name(panel.key)}.png", [panel], content) for panel in found]
    return files


def _file_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in key)


def _save(file: Path, chosen: Sequence[Panel], content: Content) -> Path:
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (4.6 * columns, 3.1 * rows + 0.5) if len(chosen) > 1 else (6.6, 4.1)
    figure = Figure(figsize=size, dpi=140, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, ax in zip(chosen, axes.flat, strict=False):
        _DRAW[panel.kind](ax, panel, content)
        if panel.zero and panel.kind is Kind.LINES and ax.get_yscale() == "linear":
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    for ax in list(axes.flat)[len(chosen) :]:
        ax.set_visible(False)
    if any(panel.kind in (Kind.LINES, Kind.POINTS) for panel in chosen):
        _legend(figure, content.groups)
    return save_png(figure, file, metadata={"Software": None})


def _legend(figure: Figure, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D

    labels = [_short(f"{g.label} (n = {len(g.runs)})", 40) for g in groups]
    handles = [Line2D([], [], **_look(i), linewidth=2, label=label) for i, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(groups)))


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)][0]


def _look(index: int) -> dict[str, Any]:
    return {"color": _colour(index), "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)]}


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _lines(ax: Axes, panel: Panel, content: Content) -> None:
    window = 1 if panel.cumulative else content.window
    if panel.metric == "policy/entropy":
        _bands(ax, content)
    positive = True
    marker = "o" if panel.markers else None
    for i, g in enumerate(content.groups):
        curves = []
        for run in g.runs:
            x, y = position(run, content.align), derived.series(run, panel.metric)
            if x is not None and y is not None:
                curves.append((x, moving_average(y, window)))
        thin = len(curves) > 1
        for x, y in curves:
            have = np.isfinite(y)
            positive = positive and bool((y[have] > 0).all())
            if panel.markers:
                x, y = x[have], y[have]
            single = "o" if len(x) == 1 else marker
            width, alpha = (0.8, 0.5) if thin else (1.6, 1.0)
            ax.plot(x, y, **_look(i), linewidth=width, alpha=alpha, marker=single, markersize=3)
        if thin:
            x, y = mean_curve(curves, content.align)
            ax.plot(x, y, **_look(i), linewidth=2, marker=marker, markersize=4)
    if panel.log and positive:
        ax.set_yscale("log")
    averaged = f" (moving average, {window} steps)" if window > 1 else ""
    ax.set_title(panel.title + (" (running share)" if panel.cumulative else averaged))
    ax.set_xlabel(AXES[content.align].title)
    ax.set_ylabel(panel.y)


def _bands(ax: Axes, content: Content) -> None:
    flat: set[float] = set()
    for i, g in enumerate(content.groups):
        for run in g.runs:
            goals, x = derived.target(run, content.reference), position(run, content.align)
            if goals is None or x is None or not np.isfinite(goals).any():
                continue
            first = float(goals[np.isfinite(goals)][0])
            if (goals[np.isfinite(goals)] == first).all():
                flat.add(first)
            else:
                low, high = goals * (1 - TOLERANCE), goals * (1 + TOLERANCE)
                ax.fill_between(x, low, high, color=_colour(i), alpha=0.12, linewidth=0)
    for goal in sorted(flat):
        ax.axhspan(goal * (1 - TOLERANCE), goal * (1 + TOLERANCE), color="#6b7480", alpha=0.15, linewidth=0)
        ax.axhline(goal, color="#6b7480", linewidth=0.9, linestyle="--")
        text = f"$H_{{tgt}}$ = {goal:g} ± 30 %"
        at = (1, goal * (1 + TOLERANCE))
        ax.annotate(
            text, at, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7.5, color="#5b6470"
        )


def _points(ax: Axes, panel: Panel, content: Content) -> None:
    for i, g in enumerate(content.groups):
        for run in g.runs:
            x, y = run.series.get(PREDICTED), run.series.get(panel.metric)
            if x is not None and y is not None:
                ax.scatter(x, y, s=7, color=_colour(i), alpha=0.6, linewidths=0)
    ax.axhline(0, color="#b8bcc2", linewidth=0.8)
    ax.axvline(0, color="#b8bcc2", linewidth=0.8)
    ax.set_title(panel.title)
    ax.set_xlabel("predicted change, nats/token a unit step")
    ax.set_ylabel(panel.y)


def _dots(ax: Axes, panel: Panel, content: Content) -> None:
    row = next((row for row in content.rows if row.measure.key == panel.metric), None)
    for i, cell in enumerate(row.cells if row else ()):
        if cell.mean is not None:
            ax.barh(i, cell.mean, color=_colour(i), alpha=0.3, height=0.6)
            ax.plot(list(cell.values.values()), [i] * cell.n, "o", color=_colour(i), markersize=5, clip_on=False)
    ax.set_xlim(0, 1.02)
    _name_bars(ax, panel, content)


def _name_bars(ax: Axes, panel: Panel, content: Content) -> None:
    """One bar a group, the first on top."""
    ax.set_yticks(range(len(content.groups)), [_short(g.label, 22) for g in content.groups])
    ax.set_ylim(len(content.groups) - 0.4, -0.6)
    ax.set_title(panel.title)
    ax.set_xlabel(panel.y)


def _phases(ax: Axes, panel: Panel, content: Content) -> None:
    rows = {row.measure.key: row for row in content.rows}
    names = phases([run for g in content.groups for run in g.runs])
    left = np.zeros(len(content.groups))
    for j, name in enumerate(names):
        row = rows.get(f"seconds_{name.removeprefix('time/')}")
        # A group without the phase has no bar of it; nothing is said about its seconds.
        values = np.array([cell.mean if cell.mean is not None else 0.0 for cell in row.cells]) if row else left * 0
        colour = PHASE_COLOURS[j % len(PHASE_COLOURS)][0]
        ax.barh(range(len(left)), values, left=left, color=colour, label=name.removeprefix("time/"), height=0.6)
        left += values
    _name_bars(ax, panel, content)
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))


_DRAW: dict[Kind, Callable[[Axes, Panel, Content], None]] = {
    Kind.LINES: _lines,
    Kind.POINTS: _points,
    Kind.DOTS: _dots,
    Kind.PHASES: _phases,
}
