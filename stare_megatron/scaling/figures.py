"""What is drawn of a scaling study: Plotly figures as JSON-like values. Colours are names of the style sheet's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stare_megatron.scaling import wording
from stare_megatron.scaling.analysis import CellResult, Results
from stare_megatron.scaling.cells import cost
from stare_megatron.scaling.curve import HELD_OUT_FROM, Curve, Unfinished
from stare_megatron.scaling.intervals import Estimate
from stare_megatron.scaling.records import Axis
from stare_megatron.scaling.sigmoid import predict

_LINE_POINTS = 120
_DASHES = ("solid", "dash", "dot", "dashdot")
Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """`traces`: Plotly's, with `hue`, the number of a colour, instead of colours. `axis`: drawn when the page shows
    this axis; None: always. `log_x`, `log_y`: logarithmic axes."""

    key: str
    title: str
    note: str
    x: str
    y: str
    traces: tuple[Trace, ...]
    axis: Axis | None = None
    log_x: bool = True
    log_y: bool = False
    wide: bool = False


_BY_SIZE: tuple[tuple[str, str, str, str, Callable[[CellResult], Estimate | None]], ...] = (
    ("end", "Accuracy at the end by size", "accuracy", "At each run's last step.", lambda r: r.last),
    (
        *("band", "Time in band by size", "share of steps"),
        "Share of the steps after the first one in the band that lie in it.",
        lambda r: r.in_band,
    ),
    ("entropy", "Entropy at the end by size", "nats/token", "Mean of the last ten steps.", lambda r: r.entropy),
)


def figures(results: Results) -> list[Figure]:
    """Every figure that has something to show."""
    made = [_curves(results, axis) for axis in Axis if _has(results, axis)]
    made += [_profiles(results)]
    if all(r.cell.parameters is not None for r in results.results):
        made += [_by_size(results, *spec) for spec in _BY_SIZE]
        made.append(_reach(results))
    return [figure for figure in made if figure.traces]


def _has(results: Results, axis: Axis) -> bool:
    return all(axis in t.cost for r in results.results for t in r.cell.trials)


def _look(results: Results, r: CellResult) -> tuple[int, str]:
    """Colour by size, dash by method: a cell keeps both in every figure."""
    sizes = list(dict.fromkeys(other.cell.size for other in results.results))
    return sizes.index(r.cell.size), _DASHES[results.methods.index(r.cell.method) % len(_DASHES)]


def _curves(results: Results, axis: Axis) -> Figure:
    traces: list[Trace] = []
    for r in results.results:
        hue, dash = _look(results, r)
        about = {"hue": hue, "legendgroup": r.cell.name}
        for t in r.cell.trials:
            x = cost(t, axis)
            kept = x > 0
            point = about | {"mode": "markers", "x": x[kept].tolist(), "y": t.accuracy[kept].tolist()}
            traces.append(point | {"name": t.name, "showlegend": False, "opacity": 0.55})
        if axis is results.axis and isinstance(r.curve, Curve | Unfinished):
            traces.append(about | _line(r, dash))
        else:
            traces.append(about | _mean(r, axis, dash))
    fitted = axis is results.axis
    note = (
        "Points: evaluations of each seed. Lines: the sigmoid inside the range of its points, dotted where its "
        f"asymptote is refused. Held out: what lies beyond {HELD_OUT_FROM:.0%} of a cell's largest cost."
        if fitted
        else "Points: evaluations of each seed. Lines join the means over seeds of equal step."
    )
    trials = [t for r in results.results for t in r.cell.trials]
    title = f"Accuracy by {wording.axis_title(axis, trials)}"
    return Figure(
        f"curves-{axis.value}",
        title,
        note,
        wording.axis_title(axis, trials),
        "accuracy",
        tuple(traces),
        axis,
        wide=True,
    )


def _line(r: CellResult, dash: str) -> Trace:
    assert isinstance(r.curve, Curve | Unfinished)
    x = r.points.x[r.points.x > 0]
    at = np.geomspace(x.min(), x.max(), _LINE_POINTS)
    shown = dash if isinstance(r.curve, Curve) else "dot"
    line = {"dash": shown, "width": 2.4 if isinstance(r.curve, Curve) else 1.2}
    return {
        "mode": "lines",
        "x": at.tolist(),
        "y": predict(r.curve.theta, at).tolist(),
        "name": r.cell.name,
        "line": line,
    }


def _mean(r: CellResult, axis: Axis, dash: str) -> Trace:
    shared = sorted(set.intersection(*({int(s) for s in t.steps} for t in r.cell.trials)) - {0})
    x, y = [], []
    for step in shared:
        found = [(cost(t, axis)[i], t.accuracy[i]) for t in r.cell.trials for i in np.flatnonzero(t.steps == step)]
        x.append(float(np.mean([a for a, _ in found])))
        y.append(float(np.mean([b for _, b in found])))
    return {"mode": "lines", "x": x, "y": y, "name": r.cell.name, "line": {"dash": dash, "width": 1.6}}


def _profiles(results: Results) -> Figure:
    traces: list[Trace] = []
    for r in results.results:
        if isinstance(r.curve, Curve | Unfinished):
            hue, dash = _look(results, r)
            p = r.curve.profile
            shown = np.minimum(p.excess / p.limit, 10)
            line = {"dash": dash, "width": 1.8}
            traces.append(
                {"hue": hue, "mode": "lines", "x": p.a.tolist(), "y": shown.tolist(), "name": r.cell.name, "line": line}
            )
    note = (
        "How much worse the best sigmoid with this asymptote fits, by what chance allows (below 1: as good, 95 %). A "
        "narrow valley is a curve that has bent; one that stays below 1 to the right edge leaves its asymptote open."
    )
    return Figure(
        "profile",
        "What the points say of each asymptote",
        note,
        "asymptote A",
        "excess by allowed excess",
        tuple(traces),
        log_x=False,
    )


def _by_size(
    results: Results, key: str, title: str, y: str, note: str, value: Callable[[CellResult], Estimate | None]
) -> Figure:
    traces: list[Trace] = []
    for number, method in enumerate(results.methods):
        told = [(r.cell.parameters, value(r)) for r in results.results if r.cell.method == method]
        told = [(n, e) for n, e in told if e is not None]
        if told:
            traces.append(_series(number, method, [float(n or 0) for n, _ in told], [e for _, e in told]))
    return Figure(key, title, f"{note} Bars: 95 % intervals over seeds.", "parameters", y, tuple(traces))


def _series(hue: int, name: str, x: Sequence[float], values: Sequence[Estimate]) -> Trace:
    above = [0.0 if e.high is None else e.high - e.value for e in values]
    below = [0.0 if e.low is None else e.value - e.low for e in values]
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    line = {"dash": _DASHES[hue % len(_DASHES)]}
    told = {"x": list(x), "y": [e.value for e in values], "error_y": bars}
    return {"hue": hue, "mode": "lines+markers", "name": name, "line": line} | told


def _reach(results: Results) -> Figure:
    traces: list[Trace] = []
    levels = [reach.accuracy for reach in results.results[0].reach]
    for number, method in enumerate(results.methods):
        own = [r for r in results.results if r.cell.method == method]
        for i, level in enumerate(levels):
            pairs = [(float(r.cell.parameters or 0), r.reach[i].by_all) for r in own]
            told = [(n, e.value) for n, e in pairs if e is not None]
            if len(told) > 1:
                line = {"dash": _DASHES[number % len(_DASHES)]}
                traces.append(
                    {"hue": i, "mode": "lines+markers", "x": [n for n, _ in told], "y": [c for _, c in told],
                     "name": f"{method}, {level:.0%}", "line": line}
                )  # fmt: skip
    note = "Where every seed reaches it, and not before its first step. Geometric mean over seeds."
    title, y = "Cost to reach an accuracy, by size", f"cost, {results.axis.value}"
    return Figure("reach", title, note, "parameters", y, tuple(traces), log_y=True)
