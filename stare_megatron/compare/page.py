"""What pages of reports share: colours, style, numbers for reading, and how a template is filled."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any

import jinja2

# Okabe and Ito's colours, told apart with any colour vision; darkened or lightened for contrast on either background.
COLOURS = (
    ("#0072b2", "#56a8e0"),
    ("#d55e00", "#f08a3c"),
    ("#009e73", "#35c79b"),
    ("#b5508e", "#dd8fc0"),
    ("#a87600", "#e6b84a"),
    ("#4a3fb0", "#a39bf0"),
    ("#56606b", "#b4bdc7"),
)
# Paul Tol's muted scheme: phases are no groups and look different.
PHASE_COLOURS = tuple(
    (c, c) for c in ("#4477aa", "#88ccee", "#44aa99", "#ddcc77", "#cc6677", "#aa4499", "#999933", "#888888")
)


def number(value: float, unit: str) -> str:
    """For reading: shares as per cent, else about four digits."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if unit == "fraction":
        percent = 100 * value
        return f"{percent:.1f} %" if abs(percent) >= 1 else f"{percent:.2g} %"
    if (value == int(value) and abs(value) < 1e15) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if float(f"{value:.3g}") == value and abs(value) >= 1e-4:
        return f"{value:.3g}"
    return f"{value:#.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def environment() -> jinja2.Environment:
    """Of templates: everything is escaped, a missing value is an error."""
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.filters.update(number=number)
    return made


def style() -> str:
    """The style sheet of every report."""
    return environment().from_string(text("report.css")).render(colours=COLOURS, phase_colours=PHASE_COLOURS)


def text(name: str, package: str = "stare_megatron.compare") -> str:
    """A file that lies beside the code of a package."""
    return resources.files(package).joinpath(name).read_text()


def as_json(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
