"""A scaling study's results, from its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stare_megatron.scaling import laws
from stare_megatron.scaling.cells import Cell, cells, cost
from stare_megatron.scaling.curve import Curve, HeldOut, Unfinished, fit_curve, hold_out
from stare_megatron.scaling.intervals import Estimate, Refusal, mean_interval
from stare_megatron.scaling.laws import PowerLaw, Reach
from stare_megatron.scaling.records import Axis, Trial
from stare_megatron.scaling.sigmoid import Points

# Fixed beforehand: levels picked after a look at the curves would favour whoever they were picked for.
LEVELS = tuple(i / 10 for i in range(1, 10))


@dataclass(frozen=True)
class CellResult:
    """One size of one method. `first`, `last`: accuracy before the first step (None without such an evaluation) and at
    the end; `entropy`: at the end, nats; `in_band`: share of the steps; None where no run has them. `error_exponent`:
    of 1 - accuracy along a run."""

    cell: Cell
    points: Points
    largest: float
    first: Estimate | None
    last: Estimate
    entropy: Estimate | None
    in_band: Estimate | None
    curve: Curve | Unfinished | Refusal
    held_out: HeldOut | Refusal
    error_exponent: Estimate | Refusal
    reach: tuple[Reach, ...]


@dataclass(frozen=True)
class Law:
    """A power law in size of one method."""

    method: str
    what: str
    law: PowerLaw | Refusal


@dataclass(frozen=True)
class Budget:
    """Accuracy of each cell at one cost, in the order of the cells; None where it cannot be read without going beyond
    the evaluations. `best`: the highest of each method, where two or more of its sizes are there."""

    cost: float
    accuracy: tuple[Estimate | None, ...]
    best: tuple[int, ...]


@dataclass(frozen=True)
class Results:
    """`notes`: what a reader of all of it should know."""

    axis: Axis
    skip: int
    results: tuple[CellResult, ...]
    laws: tuple[Law, ...]
    budgets: tuple[Budget, ...]
    notes: tuple[str, ...]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(r.cell.method for r in self.results))


def analyse(trials: Sequence[Trial], axis: Axis, skip: int, by: Sequence[str] = ()) -> Results:
    """Everything a scaling study says of these runs.

    Args:
        axis: what fits and tables are over. skip: steps of the transient that fits leave out. by: see `cells.cells`.

    Raises:
        UserError: as `cells.cells` and `cells.cost`.
    """
    found = tuple(_cell(cell, axis, skip) for cell in cells(trials, by))
    return Results(axis, skip, found, tuple(_laws(found)), tuple(_budgets(found, axis)), tuple(_notes(found)))


def _cell(cell: Cell, axis: Axis, skip: int) -> CellResult:
    points = cell.points(axis, skip)
    runs = [(cost(t, axis), t.accuracy) for t in cell.trials]
    starts = [float(t.accuracy[0]) for t in cell.trials if t.steps[0] == 0]
    return CellResult(
        cell=cell,
        points=points,
        largest=min(float(x.max()) for x, _ in runs),
        first=mean_interval(starts).within(0.0, 1.0) if starts else None,
        last=mean_interval([float(y[-1]) for _, y in runs]).within(0.0, 1.0),
        entropy=_over_seeds([t.entropy for t in cell.trials], math.inf),
        in_band=_over_seeds([t.in_band for t in cell.trials], 1.0),
        curve=fit_curve(points),
        held_out=hold_out(points),
        error_exponent=laws.error_law(runs),
        reach=tuple(laws.reach(runs, level) for level in LEVELS),
    )


def _over_seeds(values: Sequence[float], largest: float) -> Estimate | None:
    known = [v for v in values if math.isfinite(v)]
    return mean_interval(known).within(0.0, largest) if known else None


def _laws(results: Sequence[CellResult]) -> list[Law]:
    made = []
    for method in dict.fromkeys(r.cell.method for r in results):
        own = [r for r in results if r.cell.method == method]
        sized = [(r.cell.parameters, r) for r in own if r.cell.parameters is not None]
        if len(sized) < len(own):
            made.append(
                Law(method, "1 - accuracy at the end", Refusal("the records do not say how large the models are"))
            )
            continue
        sizes = [float(n) for n, _ in sized]
        made.append(Law(method, "1 - accuracy at the end", laws.power_law(sizes, [1 - r.last.value for _, r in sized])))
        for i, level in enumerate(LEVELS):
            told = [(n, r.reach[i].by_all) for n, r in zip(sizes, own, strict=True)]
            costs = [(n, e.value) for n, e in told if e is not None]
            if len(costs) >= laws.LEAST_SIZES:
                law = laws.power_law([n for n, _ in costs], [c for _, c in costs])
                made.append(
                    Law(method, f"cost to reach {level:.0%}, of the {len(costs)} of {len(own)} sizes that do", law)
                )
    return made


def _budgets(results: Sequence[CellResult], axis: Axis) -> list[Budget]:
    runs = [[(cost(t, axis), t.accuracy) for t in r.cell.trials] for r in results]
    positive = [float(x[x > 0].min()) for part in runs for x, _ in part if np.any(x > 0)]
    made = []
    for at in laws.budgets(max(r.largest for r in results), min(positive, default=0.0)):
        accuracy = tuple(laws.at_cost(part, at) for part in runs)
        best = []
        for method in dict.fromkeys(r.cell.method for r in results):
            there = [
                (e.value, i)
                for i, (r, e) in enumerate(zip(results, accuracy, strict=True))
                if e is not None and r.cell.method == method
            ]
            best += [max(there)[1]] if len(there) > 1 else []
        if any(e is not None for e in accuracy):
            made.append(Budget(at, accuracy, tuple(best)))
    return made


def _notes(results: Sequence[CellResult]) -> list[str]:
    trials = [t for r in results for t in r.cell.trials]
    notes = [f"{t.name}: {note}" for t in trials for note in t.notes]
    seeds = [len(r.cell.trials) for r in results]
    if min(seeds) == 1:
        notes.append("Where there is one seed there is no interval: what another seed would give is not known.")
    if 2 in seeds:
        notes.append("With two seeds an interval has one degree of freedom (t = 12.7): wide, and honestly so.")
    ends = {int(t.steps[-1]) for t in trials}
    if len(ends) > 1:
        notes.append(
            f"Runs end at different steps ({min(ends)} to {max(ends)}): accuracies at the end are not of equal length."
        )
    for key, what in (("reward.name", "rewards"), ("trainer.world_size", "numbers of ranks")):
        values = {str(t.run.settings[key]) for t in trials if key in t.run.settings}
        if len(values) > 1:
            notes.append(f"The runs have different {what} ({', '.join(sorted(values))}): compare with care.")
    if len({t.gpu for t in trials}) > 1:
        notes.append("Some runs are of GPUs and some of CPUs, or not recorded: hours are not of one kind.")
    return notes
