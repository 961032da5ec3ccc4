"""Cells of the tables of docs/results.md: what a run's records say, over the seeds of a variant."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from stare_megatron.compare.load import Run, load
from stare_megatron.compare.stats import TOLERANCE, band

ROOT = Path(__file__).resolve().parents[1]
LAST = 10  # steps that end values are means of
READ: set[Path] = set()  # folders of runs that tables were made from

Seeds = Sequence[Run]
Cell = Callable[[Seeds], str]


@dataclass(frozen=True)
class Column:
    """`cell`: the text for the runs of a row, one a seed."""

    head: str
    cell: Cell


@cache
def runs(folder: str, *names: str) -> tuple[Run, ...]:
    """`folder`: under examples/; a name without a seed stands for its seeds 1, 2, 3, as many as there are."""
    where = ROOT / "examples" / folder
    found = [p for n in names for p in ([where / n] if "-seed" in n else sorted(where.glob(f"{n}-seed*")))]
    READ.update(found)
    return tuple(load(path, 0.0) for path in found)


def entropy(run: Run) -> np.ndarray:
    return run.series["policy/entropy"]


def target(run: Run, otherwise: float) -> np.ndarray:
    """Of each step; `otherwise`: where the method has none."""
    goals = run.series.get("policy/target_entropy")
    return goals if goals is not None and np.isfinite(goals).all() else np.full(len(run.steps), otherwise)


def newest(run: Run, metric: str) -> tuple[int, float]:
    """Step and value."""
    values = run.series[metric]
    at = int(np.flatnonzero(np.isfinite(values))[-1])
    return int(run.steps[at]), float(values[at])


def at(run: Run, metric: str, step: int) -> float:
    return float(run.series[metric][run.steps == step][0])


def spread(digits: int, value: Callable[[Run], float], *, with_spread: bool = True) -> Cell:
    """Mean over the seeds, and their standard deviation where there are several."""

    def cell(seeds: Seeds) -> str:
        found = [value(run) for run in seeds]
        if not all(np.isfinite(found)):
            return "-"
        text = f"{statistics.fmean(found):.{digits}f}"
        several = with_spread and len(found) > 1
        return f"{text} ± {statistics.stdev(found):.{digits}f}" if several else text

    return cell


def centre(digits: int, value: Callable[[Run], float]) -> Cell:
    """Mean over the seeds."""
    return spread(digits, value, with_spread=False)


def each(digits: int, value: Callable[[Run], float]) -> Cell:
    def cell(seeds: Seeds) -> str:
        found = [value(run) for run in seeds]
        return ", ".join(f"{x:.{digits}f}" if np.isfinite(x) else "-" for x in found)

    return cell


def signed(digits: int, value: Callable[[Run], float]) -> Cell:
    return lambda seeds: f"{statistics.fmean(value(run) for run in seeds):+.{digits}f}"


def evaluated(metric: str) -> Callable[[Run], float]:
    return lambda run: newest(run, f"eval/test/{metric}")[1]


def last(metric: str) -> Callable[[Run], float]:
    return lambda run: float(run.series[metric][-LAST:].mean())


def ends_at(run: Run) -> float:
    return float(entropy(run)[-LAST:].mean())


def gate(run: Run) -> float:
    open_ = run.series.get("stare/gate")
    return float("nan") if open_ is None or run.settings["algorithm.method"] != "stare" else float(open_.mean())


def kept(goal: float, field: str) -> Callable[[Run], float]:
    """A field of `compare.stats.Band`."""

    def value(run: Run) -> float:
        found = band(entropy(run).tolist(), target(run, goal).tolist(), run.steps.tolist())
        return float(vars(found)[field])

    return value


def under_the_band(goal: float) -> Callable[[Run], float]:
    """How far the entropy fell under its lower edge, after it was first inside. Nats."""

    def value(run: Run) -> float:
        goals = target(run, goal)
        inside = np.flatnonzero(abs(entropy(run) - goals) <= TOLERANCE * goals)
        after = slice(int(inside[0]) + 1, None)
        return max(0.0, float(((1 - TOLERANCE) * goals[after] - entropy(run)[after]).max()))

    return value


def held(goal: float, measure: Callable[[np.ndarray], float]) -> Callable[[Run], float]:
    """Of H - H_tgt from the first step at which the entropy is not above the target."""

    def value(run: Run) -> float:
        off = entropy(run) - target(run, goal)
        return measure(off[int(np.argmax(off <= 0)) :])

    return value


def means(values: np.ndarray, count: int) -> np.ndarray:
    """Of `count` consecutive values each; what is left over at the end is not counted."""
    whole = len(values) // count * count
    return values[:whole].reshape(-1, count).mean(1)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def by_variant(folder: str, variants: dict[str, str], columns: Sequence[Column]) -> str:
    head = ["variant", *(c.head for c in columns)]
    rows = ((title, runs(folder, *name.split())) for name, title in variants.items())
    return markdown(head, ([title, *(c.cell(seeds) for c in columns)] for title, seeds in rows))
