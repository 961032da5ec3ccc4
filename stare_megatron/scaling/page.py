"""The page of a scaling study: one HTML file that needs nothing else, as `compare`'s."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from stare_megatron import __version__
from stare_megatron.compare.page import COLOURS, as_json, environment, style, text
from stare_megatron.scaling import wording
from stare_megatron.scaling.analysis import CellResult, Results
from stare_megatron.scaling.curve import Curve
from stare_megatron.scaling.figures import figures
from stare_megatron.scaling.intervals import Refusal
from stare_megatron.scaling.records import Axis

_PACKAGE = "stare_megatron.scaling"


def render(results: Results, title: str) -> str:
    """The page. The same results give the same text."""
    trials = [t for r in results.results for t in r.cell.trials]
    drawn = figures(results)
    data = [vars(replace(figure, axis=None)) | {"axis": figure.axis and figure.axis.value} for figure in drawn]
    levels = [i for i, r in enumerate(results.results[0].reach) if any(c.reach[i].reached for c in results.results)]
    return (
        environment()
        .from_string(text("scaling.html", _PACKAGE))
        .render(
            title=title,
            headline=_headline(results),
            axis=results.axis.value,
            axes=[(a.value, wording.axis_title(a, trials)) for a in Axis if any(f.axis is a for f in drawn)],
            axis_title=wording.axis_title(results.axis, trials),
            figures=drawn,
            cells=[_row(r) for r in results.results],
            refusals=[
                (r.cell.name, what, wording.reason(found))
                for r in results.results
                for what, found in (
                    ("sigmoid", r.curve),
                    ("held-out error", r.held_out),
                    ("power law", r.error_exponent),
                )
                if wording.reason(found)
            ],
            levels=[f"{results.results[0].reach[i].accuracy:.0%}" for i in levels],
            reach=[(r.cell.name, [wording.reached(r.reach[i]) for i in levels]) for r in results.results],
            names=[r.cell.name for r in results.results],
            budgets=[
                (wording.cost(b.cost), [(wording.accuracy(e), i in b.best) for i, e in enumerate(b.accuracy)])
                for b in results.budgets
            ],
            laws=[(law.method, law.what, wording.law(law.law)) for law in results.laws],
            runs=trials,
            notes=results.notes,
            skip=results.skip,
            version=__version__,
            colours=COLOURS,
            css=Markup(style()),
            js=Markup(text("scaling.js", _PACKAGE)),
            plotly=Markup(get_plotlyjs()),
            data=Markup(as_json({"figures": data, "axis": results.axis.value, "colours": len(COLOURS)})),
        )
    )


def _headline(results: Results) -> str:
    runs = sum(len(r.cell.trials) for r in results.results)
    sizes = list(dict.fromkeys(r.cell.size for r in results.results))
    known = [r.cell.parameters for r in results.results if r.cell.parameters is not None]
    factor = f", a factor of {max(known) / min(known):.3g} in parameters" if len(set(known)) > 1 else ""
    return f"{runs} runs: {len(results.methods)} methods, {len(sizes)} sizes ({', '.join(sizes)}){factor}."


def _row(r: CellResult) -> dict[str, Any]:
    curve = r.curve if isinstance(r.curve, Curve) else None
    return {
        "method": r.cell.method,
        "size": r.cell.size,
        "seeds": len(r.cell.trials),
        "first": wording.accuracy(r.first),
        "last": wording.accuracy(r.last),
        "asymptote": wording.asymptote(r.curve),
        "mid": wording.costs(curve.mid) if curve else wording.NOTHING,
        "b": wording.plain(curve.b) if curve else wording.NOTHING,
        "held_out": wording.held_out(r.held_out),
        "exponent": wording.NOTHING if isinstance(r.error_exponent, Refusal) else wording.plain(r.error_exponent),
        "entropy": wording.plain(r.entropy),
        "in_band": wording.accuracy(r.in_band),
    }
