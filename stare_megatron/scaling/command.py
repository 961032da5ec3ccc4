"""`stare-megatron scale`: from finished runs, or a study, to a page, its numbers and what they say in a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from stare_megatron.errors import UserError
from stare_megatron.host.files import write_atomic
from stare_megatron.scaling import wording
from stare_megatron.scaling.analysis import Results, analyse
from stare_megatron.scaling.page import render
from stare_megatron.scaling.records import Axis, Trial, read
from stare_megatron.study import command as study_command
from stare_megatron.study import spec

PAGE = "scaling.html"


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `out`: folder of the page; None: of a study, beside its runs."""

    axis: Axis
    benchmark: str = ""
    skip: int = 0
    by: tuple[str, ...] = ()
    title: str = ""
    out: Path | None = None
    json_file: Path | None = None


@dataclass(frozen=True)
class StudyOptions:
    """Of a study's runs, as `stare-megatron study` takes them."""

    form: str = ""
    only: tuple[str, ...] = ()
    jobs: int = 0
    dry_run: bool = False


def run(paths: Sequence[Path], options: Options, study: StudyOptions, console: Console) -> int:
    """The command; returns its exit code, which is the study's where that did not finish.

    Raises:
        UserError: no run, a damaged record, an axis that a run does not have, or a folder that cannot be written.
    """
    if options.skip < 0:
        raise UserError(f"--skip {options.skip}: steps of the transient to leave out, at least 0")
    files = [path for path in paths if path.suffix == ".toml"]
    if files and len(paths) > 1:
        raise UserError(f"{files[0]}: give one study file, or the folders of runs")
    if not files:
        if options.out is None:
            raise UserError("--out FOLDER is missing: where the page of these runs goes")
        if study != StudyOptions():
            raise UserError("--form, --only, --jobs and --dry-run are of a study file; runs are given by their folders")
        return _report(paths, options, options.out, console)
    code = study_command.run(
        files[0], form=study.form, only=study.only, jobs=study.jobs, folder=None, dry_run=study.dry_run
    )
    if study.dry_run or code:
        return code
    made = spec.load(files[0], study.form, study.only)
    out = options.out or made.folder.with_name(f"{made.folder.name}-scaling")
    return _report([job.config.folder for job in made.jobs], options, out, console)


def _report(paths: Sequence[Path], options: Options, out: Path, console: Console) -> int:
    trials = read(paths, options.benchmark, time.time())
    results = analyse(trials, options.axis, options.skip, options.by)
    title = options.title or "Scaling: " + ", ".join(results.methods)
    page = out / PAGE
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(page, render(results, title))
        if options.json_file is not None:
            options.json_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(options.json_file, json.dumps(numbers(results), indent=2, allow_nan=False) + "\n")
    except OSError as e:
        raise UserError(f"--out {out}: cannot write {e.filename or out}: {e.strerror}") from e
    _say(results, console)
    console.print(f"open {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


def numbers(results: Results) -> dict[str, Any]:
    """Everything as JSON-like values; what is not finite, or not there, is null."""
    return {
        "axis": results.axis.value,
        "skip": results.skip,
        "notes": list(results.notes),
        "cells": [
            {
                "method": r.cell.method,
                "size": r.cell.size,
                "parameters": r.cell.parameters,
                "runs": [_run(t) for t in r.cell.trials],
                **{name: _tree(value) for name, value in vars(r).items() if name not in ("cell", "points")},
            }
            for r in results.results
        ],
        "laws": [_tree(law) for law in results.laws],
        "budgets": [_tree(budget) for budget in results.budgets],
    }


def _run(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.name,
        "folder": str(trial.run.folder),
        "seed": trial.seed,
        "steps": trial.steps.tolist(),
        "accuracy": _tree(trial.accuracy),
        "se": _tree(trial.se),
        "cost": {axis.value: _tree(values) for axis, values in trial.cost.items()},
    }


def _tree(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _tree(item) for name, item in vars(value).items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_tree(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.floating | float):
        return float(value) if math.isfinite(value) else None
    return value


def _say(results: Results, console: Console) -> None:
    for r in results.results:
        start = "" if r.first is None else f"{wording.accuracy(r.first)} to "
        told = f"{start}{wording.accuracy(r.last)}, asymptote {wording.asymptote(r.curve)}"
        _line(console, f"{r.cell.name}: {told}; held out: {wording.held_out(r.held_out)}")
    for r in results.results:
        if wording.reason(r.curve):
            _line(console, f"{r.cell.name}: {wording.reason(r.curve)}")
    for law in results.laws:
        _line(console, f"{law.method}: {law.what}: {wording.law(law.law)}")
    for note in results.notes:
        _line(console, note)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
