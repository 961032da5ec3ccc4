"""Runs from disk: folders with `metrics.jsonl` or `metrics.jsonl.gz`."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np

from stare_megatron.config import flatten
from stare_megatron.errors import UserError
from stare_megatron.metrics import eval_records, jsonl
from stare_megatron.run.folder import RunFolder

PACKED = jsonl.FILE + ".gz"
Setting = str | int | float | bool | None
Series = np.ndarray  # float64 [steps]; NaN where the step has no value

# Younger than this, or than ten of its steps, a metrics file without its last step belongs to a run that is going.
_FRESH_SECONDS = 600.0


class State(Enum):
    """`UNKNOWN`: the number of steps planned is not known."""

    FINISHED = "finished"
    RUNNING = "running"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Start:
    """One start of a run, of `run.json`."""

    time: str
    python: str
    packages: Mapping[str, str]
    commit: str
    dirty: bool
    hardware: str


@dataclass(frozen=True)
class Run:
    """One run. `steps`: int64 [n], rising; `series`: metric -> float64 [n], only metrics that some step has.

    `settings`: the resolved configuration as dotted key -> value, empty when it is not known; `planned`: steps of the
    whole run; `folder`: where it was read from; `notes`: what a reader of its numbers should know.
    """

    name: str
    folder: Path
    steps: np.ndarray
    series: Mapping[str, Series]
    settings: Mapping[str, Setting]
    starts: Sequence[Start]
    planned: int | None
    state: State
    notes: tuple[str, ...]


def load_all(paths: Sequence[Path], now: float) -> list[Run]:
    """Every run under the paths, in the order given, each once; a name that occurs twice gets its folder's parent.

    Args:
        paths: run folders, or folders that hold such.
        now: seconds since the epoch; tells a run that is going from one that was stopped.

    Raises:
        UserError: no run there, or a damaged file.
    """
    runs: list[Run] = []
    seen: set[Path] = set()
    for path in paths:
        for source in _sources(path):
            if source.resolve() not in seen:
                seen.add(source.resolve())
                runs.append(load(source, now))
    for level in (1, 2, 3):
        names = [run.name for run in runs]
        runs = [
            replace(run, name=f"{run.folder.resolve().parts[-1 - level]}/{run.name}")
            if names.count(run.name) > 1 and len(run.folder.resolve().parts) > level + 1
            else run
            for run in runs
        ]
    return runs


def load(path: Path, now: float) -> Run:
    """One run, from a folder with a metrics file.

    Raises:
        UserError: a damaged file.
    """
    file = _metrics_file(path)
    if file is None:
        raise UserError(f"{path}: no {jsonl.FILE} or {PACKED} in it; is it the folder of a run?")
    record = jsonl.read_record(file)
    _check_rising(file, record.rows)
    folder = RunFolder(path, fresh=False)
    settings = _settings(folder.config) if folder.config.is_file() else {}
    starts = _starts(folder.record) if folder.record.is_file() else []
    notes = ["last line of the metrics was cut off: left out"] if record.torn else []
    notes += [] if settings else ["no config.toml: settings unknown"]
    versions = {(s.commit, s.dirty, *sorted(s.packages.items())) for s in starts}
    notes += ["its starts ran different versions"] if len(versions) > 1 else []
    rows = _with_evaluations(record.rows, path / eval_records.TABLE)
    return _run(path, rows, settings, starts, notes, now - file.stat().st_mtime)


def _metrics_file(folder: Path) -> Path | None:
    """The plain file before the packed one: it is the newer where both are there."""
    return next((f for f in (folder / jsonl.FILE, folder / PACKED) if f.is_file()), None)


def _sources(path: Path) -> list[Path]:
    if _metrics_file(path) is not None:
        return [path]
    if path.is_dir():
        found = {f.parent for name in (jsonl.FILE, PACKED) for f in path.rglob(name)}
        if found:
            return sorted(found)
        if (path / eval_records.RESPONSES).is_dir():
            raise UserError(
                f"{path}: what `eval` found, no run; leave it out, or name a folder of runs, {path.parent}: what is no "
                "run in it is passed over"
            )
        raise UserError(f"{path}: no {jsonl.FILE} or {PACKED} in it or below; is it the folder of a run?")
    raise UserError(f"{path}: no such folder; give the folder of a run, e.g. runs/NAME")


def _with_evaluations(rows: list[jsonl.Row], table: Path) -> list[jsonl.Row]:
    """The steps with what their policies were found to be on held-out prompts. That of the policy before the first step
    is left out: it belongs to no step."""
    found = {row["step"]: row for row in (jsonl.read(table) if table.is_file() else [])}
    return [row | found.get(row["step"], {}) for row in rows]


def _run(
    path: Path,
    rows: list[jsonl.Row],
    settings: Mapping[str, Setting],
    starts: Sequence[Start],
    notes: list[str],
    age: float,
) -> Run:
    if not rows:
        raise UserError(f"{path}: no step was logged yet, nothing to compare")
    series = {
        metric: np.array([row.get(metric, np.nan) for row in rows])
        for metric in dict.fromkeys(metric for row in rows for metric in row)
        if metric != "step"
    }
    steps = np.array([row["step"] for row in rows]).astype(np.int64)
    planned = settings.get("run.steps")
    planned = planned if isinstance(planned, int) else None
    given = settings.get("run.name")
    if planned is None:
        state = State.UNKNOWN
    elif steps[-1] >= planned:
        state = State.FINISHED
    else:
        each = float(np.nanmedian(series["time/step"])) if "time/step" in series else 0.0
        state = State.RUNNING if age < max(_FRESH_SECONDS, 10 * each) else State.STOPPED
    if steps[0] > 1:
        notes = [*notes, f"begins at step {steps[0]}"]
    missing = int(steps[-1] - steps[0] + 1 - len(steps))
    if missing:
        notes = [*notes, f"{missing} steps are missing"]
    name = given if isinstance(given, str) else path.resolve().name
    return Run(name, path, steps, series, settings, starts, planned, state, tuple(notes))


def _check_rising(file: Path, rows: list[jsonl.Row]) -> None:
    for number, (before, row) in enumerate(itertools.pairwise(rows), 2):
        if row["step"] <= before["step"]:
            raise UserError(
                f"{file}:{number}: key 'step': {row['step']:g} after {before['step']:g}; steps must rise, do two runs "
                "write into this file?"
            )


def _starts(file: Path) -> list[Start]:
    try:
        return [
            Start(s["time"], s["python"], s["packages"], s["commit"], s["dirty"], s["hardware"])
            for s in json.loads(file.read_text())["starts"]
        ]
    except KeyError as e:
        raise UserError(f"{file}: key {e} is missing in the record of a run; mend the file or remove it") from e
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{file}: not the record of a run ({e}); mend the file or remove it") from e


def _settings(file: Path) -> dict[str, Setting]:
    """Dotted key -> value of a configuration; a list, and a table inside one, becomes its JSON text."""
    try:
        tree = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UserError(f"{file}: not a configuration ({e}); mend it or remove it") from e
    return {
        key: value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True, default=str)
        for key, value in flatten(tree).items()
    }
