"""Cells: the runs of one method at one size, over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stare_megatron.compare.load import Setting
from stare_megatron.errors import UserError
from stare_megatron.scaling.records import Axis, Trial
from stare_megatron.scaling.sigmoid import Points

_METHOD = "algorithm."
_SHOWN = 3  # settings in the label of a method


@dataclass(frozen=True)
class Cell:
    """`parameters`: None where the records do not say; then `size` is the model's name."""

    method: str
    size: str
    parameters: int | None
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        return f"{self.method}, {self.size}"

    def points(self, axis: Axis, skip: int) -> Points:
        """Evaluations of all its runs, each run a seed. `skip`: steps of the transient that are left out; the
        evaluation before the first step stays.

        Raises:
            UserError: a run that did not log what the axis takes.
        """
        x, y, se, seed = [], [], [], []
        for number, trial in enumerate(self.trials):
            kept = (trial.steps == 0) | (trial.steps > skip)
            x.append(cost(trial, axis)[kept])
            y.append(trial.accuracy[kept])
            se.append(trial.se[kept])
            seed.append(np.full(int(kept.sum()), number))
        return Points(np.concatenate(x), np.concatenate(y), np.concatenate(se), np.concatenate(seed))


def cost(trial: Trial, axis: Axis) -> np.ndarray:
    """What a run had cost at each of its evaluations.

    Raises:
        UserError: it did not log that.
    """
    if axis not in trial.cost:
        have = ", ".join(a.value for a in trial.cost) or "none"
        raise UserError(
            f"{trial.run.folder}: --axis {axis.value}: its record does not say (it begins late, or is of an older "
            f"version without these metrics); axes it has: {have}"
        )
    return trial.cost[axis]


def cells(trials: Sequence[Trial], by: Sequence[str] = ()) -> list[Cell]:
    """Cells by method, as they come, and rising size. Runs are of one method when their settings of `algorithm.` and of
    the keys of `by` (a section ends in a dot) are equal.

    Raises:
        UserError: a run twice in a cell with the same seed.
    """
    labels = _methods(trials, by)
    found: dict[tuple[str, object], list[Trial]] = {}
    for trial, label in zip(trials, labels, strict=True):
        size: object = trial.parameters if trial.parameters is not None else trial.model
        found.setdefault((label, size), []).append(trial)
    order = list(dict.fromkeys(labels))
    made = [
        Cell(label, _size(members[0]), members[0].parameters, tuple(members)) for (label, _), members in found.items()
    ]
    for cell in made:
        seeds = [trial.seed for trial in cell.trials if trial.seed is not None]
        if len(set(seeds)) < len(seeds):
            names = ", ".join(trial.name for trial in cell.trials)
            raise UserError(
                f"{cell.name}: two runs of one seed ({names}) would count as independent; leave one out, or part them "
                "with --by KEY"
            )
    return sorted(made, key=lambda c: (order.index(c.method), c.parameters or 0, c.size))


def short(parameters: int) -> str:
    """30560 as 30.6k, 1942464 as 1.94M, 7615616512 as 7.62B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return str(parameters)


def _size(trial: Trial) -> str:
    return trial.model if trial.parameters is None else short(trial.parameters)


def _methods(trials: Sequence[Trial], by: Sequence[str]) -> list[str]:
    """The label of each run's method: its name, and where several share it the settings in which they differ."""

    def counts(key: str) -> bool:
        return any(key == name or (name.endswith(".") and key.startswith(name)) for name in (_METHOD, *by))

    own = [{k: v for k, v in trial.run.settings.items() if counts(k)} for trial in trials]
    names = [str(settings.get("algorithm.method", "method not recorded")) for settings in own]
    labels = []
    for settings, name in zip(own, names, strict=True):
        others = [s for s, n in zip(own, names, strict=True) if n == name]
        labels.append(", ".join([name, *_differing(settings, others)]))
    return labels


def _differing(settings: dict[str, Setting], others: Sequence[dict[str, Setting]]) -> list[str]:
    keys = dict.fromkeys(key for s in others for key in s)
    unlike = [key for key in keys if len({json.dumps(s.get(key)) for s in others}) > 1]
    shown = [f"{key.rpartition('.')[2]}={settings.get(key)}" for key in unlike]
    return shown if len(shown) <= _SHOWN else [*shown[:_SHOWN], f"and {len(shown) - _SHOWN} more"]
