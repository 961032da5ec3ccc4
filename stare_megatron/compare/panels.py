"""What is drawn, in the report and as PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from stare_megatron.compare import derived
from stare_megatron.compare.load import Run


class Kind(Enum):
    """Lines over the axis; points of two metrics; a measure of the table as dots; the mean seconds of each phase."""

    LINES = "lines"
    POINTS = "points"
    DOTS = "dots"
    PHASES = "phases"


@dataclass(frozen=True)
class Panel:
    """One picture.

    `metric`: a logged or derived series (lines), that of the y axis (points), or a measure's key (dots).
    `y`: axis title with unit. `log`: logarithmic when all values are positive. `zero`: the axis includes 0.
    `markers`: single points are drawn, the metric is not logged at every step. `cumulative`: never smoothed.
    `folded`: shown when asked for.
    """

    key: str
    section: str
    title: str
    metric: str
    y: str
    note: str
    kind: Kind = Kind.LINES
    log: bool = False
    zero: bool = True
    markers: bool = False
    cumulative: bool = False
    folded: bool = False


SECTIONS = {
    "Entropy": "The policy's entropy against the band of ±30 % around its target (shaded).",
    "Reward and accuracy": "",
    "Evaluation": "Held-out prompts, at the steps where they were evaluated.",
    "Responses": "",
    "Groups": "What dynamic sampling had to work with.",
    "Control": "",
    "Entropy dynamics": "Which tokens pull the entropy down, and whether theory predicted what happened.",
    "Optimisation": "",
    "Engine against trainer": "How far the log-probs of the sampling engine are from those of the trainer.",
    "Cost": "",
}

PREDICTED, MEASURED = "dynamics/predicted_change_before", "dynamics/measured_change"
_QUADRANTS = {
    "pos_likely": "A > 0, likely",
    "neg_likely": "A < 0, likely",
    "pos_unlikely": "A > 0, unlikely",
    "neg_unlikely": "A < 0, unlikely",
}
_SHARES = {"tokens": "Tokens", "advantage": "Sum of |A|", "change": "Predicted change"}


def _line(section: str, title: str, metric: str, label: str, **look: bool) -> Panel:
    found = derived.info(metric)
    y = label if found.unit in ("", "1") or found.unit in label else f"{label}, {found.unit}"
    key, note = metric.replace("/", "_").replace("@", "_at_"), f"{metric}: {found.meaning}"
    return Panel(key, section, title, metric, y, note, Kind.LINES, **look)


def _fixed() -> list[Panel]:
    entropy, dynamics, optimisation, cost = "Entropy", "Entropy dynamics", "Optimisation", "Cost"
    reward, responses, agreement = "Reward and accuracy", "Responses", "Engine against trainer"
    in_band = "Share of the steps after the first one inside the band that lie inside."
    in_band += " Each dot is a run, the bar is the mean."
    points = f"{MEASURED} over {PREDICTED}: one point a step."
    points += " In the quadrants top right and bottom left the sign was predicted."
    both, change = "Predicted against measured", "measured change, nats/token"
    phase = "Mean over all steps and runs of the group."
    return [
        _line(entropy, "Entropy", "policy/entropy", "entropy"),
        Panel("time_in_band", entropy, "Time in band", "share_in_band", "share of steps", in_band, Kind.DOTS),
        _line(reward, "Reward", "reward/mean", "mean reward"),
        _line(reward, "Accuracy", "reward/correct", "share of answers correct"),
        _line(responses, "Response length", "response/length_mean", "length"),
        _line(responses, "Truncated responses", "response/truncated", "share of responses"),
        _line(responses, "Reflection words", "response/reflections", "words/response"),
        _line("Groups", "Fully solved groups", "all_correct_fraction", "share of sampled groups"),
        _line("Groups", "Unsolved groups", "none_correct_fraction", "share of sampled groups"),
        _line("Control", "Gate duty so far", "gate_duty", "share of steps", cumulative=True),
        _line("Control", "Weight of L+", "stare/weight_pos", "W"),
        Panel("predicted_measured", dynamics, both, MEASURED, change, points, Kind.POINTS, zero=False),
        _line(dynamics, "Measured entropy change", MEASURED, "change", zero=False),
        *(
            _line(dynamics, f"{what}: {name}", f"dynamics/{kind}_{quadrant}", "fraction", folded=True)
            for kind, what in _SHARES.items()
            for quadrant, name in _QUADRANTS.items()
        ),
        _line(optimisation, "Gradient norm", "update/grad_norm", "L2 norm", log=True, zero=False),
        _line(optimisation, "Learning rate", "update/lr", "learning rate"),
        _line(agreement, "Mismatch, mean", "mismatch/mean", "|difference|", log=True, zero=False),
        _line(agreement, "Mismatch, largest", "mismatch/max", "|difference|", log=True, zero=False),
        _line(cost, "Tokens sampled a second", "throughput/tokens_per_second", "tokens/s"),
        Panel("phases", cost, "Seconds per step, by phase", "time/", "seconds", phase, Kind.PHASES),
        _line(cost, "Time per step", "time/step", "time"),
        _line(cost, "Memory, trainer rank", "memory/trainer_peak", "peak"),
        _line(cost, "Memory, engine", "memory/engine_peak", "peak"),
        _line(cost, "Memory, driver", "memory/driver_peak", "peak"),
    ]


def panels(runs: Sequence[Run], reference: float | None) -> list[Panel]:
    """The panels some run has finite values for, in the order of `SECTIONS`; a panel for every `eval/` metric."""
    found = _fixed()
    names = derived.evaluations(sorted(name for run in runs for name in run.series))
    found += [_line("Evaluation", n.removeprefix("eval/"), n, n.rpartition("/")[2], markers=True) for n in names]
    kept = [panel for panel in found if any(_has(run, panel, reference) for run in runs)]
    order = list(SECTIONS)
    return sorted(kept, key=lambda panel: order.index(panel.section))


def missing(runs: Sequence[Run], reference: float | None) -> list[str]:
    """Titles of panels left out because no run has their metric."""
    return [panel.title for panel in _fixed() if not any(_has(run, panel, reference) for run in runs)]


def _has(run: Run, panel: Panel, reference: float | None) -> bool:
    if panel.kind is Kind.DOTS:
        return "policy/entropy" in run.series and derived.target(run, reference) is not None
    if panel.kind is Kind.PHASES:
        return bool(phases([run]))
    values = derived.series(run, panel.metric)
    if values is None or (panel.kind is Kind.POINTS and PREDICTED not in run.series):
        return False
    return bool((values == values).any())


def phases(runs: Sequence[Run]) -> list[str]:
    """Names of `time/` metrics that are parts of a step, in the order they were logged."""
    names = dict.fromkeys(n for run in runs for n in run.series if n.startswith("time/"))
    # The first two hold the phases, the others are parts of some.
    return [n for n in names if n not in ("time/step", "time/elapsed", "time/offload", "time/onload", "time/reference")]
