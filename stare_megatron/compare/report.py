"""`stare-megatron compare`: from run folders to `report.html`, PNGs and the table's numbers as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stare_megatron.compare import measures
from stare_megatron.compare.align import Align
from stare_megatron.compare.group import differing, group, seed
from stare_megatron.compare.html import Content, render
from stare_megatron.compare.load import Run, load_all
from stare_megatron.compare.panels import missing
from stare_megatron.compare.samples import read_samples
from stare_megatron.errors import UserError
from stare_megatron.host.files import write_atomic
from stare_megatron.metrics.advice import WINDOW, Settings, advise

REPORT = "report.html"
PNGS = "png"


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    align, window: how PNGs are laid out and smoothed, and how the report opens. last: steps that end values average.
    target: H_tgt for runs whose method does not act on one, nats. ignore: see `group.group`. samples: files of samples
    shown of each run. json_file: where the numbers go, besides the report.
    """

    align: Align = Align.STEP
    window: int = 1
    last: int = 10
    target: float | None = None
    ignore: tuple[str, ...] = ()
    title: str = ""
    samples: int = 3
    png: bool = True
    json_file: Path | None = None


def compare(paths: Sequence[Path], out: Path, options: Options) -> list[Path]:
    """Read the runs, write the outputs into `out`, each replaced whole; returns the files, the report first.

    Raises:
        UserError: no run, a damaged file, an option out of range, or a folder that cannot be written.
    """
    _check(options)
    content = gather(paths, options, time.time())
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = [_write(out / REPORT, render(content))]
        if options.json_file is not None:
            options.json_file.parent.mkdir(parents=True, exist_ok=True)
            files.append(_write(options.json_file, json.dumps(numbers(content), indent=2, allow_nan=False) + "\n"))
        if options.png:
            from stare_megatron.compare.png import write_pngs

            files += write_pngs(out / PNGS, content)
    except OSError as e:
        raise UserError(f"--out {out}: cannot write {e.filename or out}: {e.strerror}") from e
    return files


def gather(paths: Sequence[Path], options: Options, now: float) -> Content:
    """Everything the outputs show. `now`: see `load.load_all`."""
    runs = load_all(paths, now)
    groups = group(runs, options.ignore)
    rows, absent = measures.table(groups, options.last, options.target)
    samples = {run.name: read_samples(run.folder, options.samples) for run in runs if run.folder.is_dir()}
    alone = len(runs) == 1
    title = options.title or (runs[0].name if alone else "Runs compared: " + ", ".join(g.label for g in groups))
    return Content(
        title=title,
        groups=groups,
        rows=rows,
        absent=absent,
        missing=missing(runs, options.target),
        samples={name: steps for name, steps in samples.items() if steps},
        align=options.align,
        window=options.window,
        last=options.last,
        reference=options.target,
        advice=[found.text for found in advise(last_rows(runs[0]), Settings.of(runs[0].settings))] if alone else (),
    )


def last_rows(run: Run) -> list[dict[str, float]]:
    """The newest steps as rows of the metrics file; NaN where one lacks a value."""
    return [
        {name: float(values[i]) for name, values in run.series.items()}
        for i in range(max(0, len(run.steps) - WINDOW), len(run.steps))
    ]


def numbers(content: Content) -> dict[str, Any]:
    """The table as JSON-like values; what a run lacks is null or not there, a value that is not finite a string."""
    unlike = differing(content.groups)
    return {
        "last_steps": content.last,
        "groups": [
            {
                "label": g.label,
                "runs": [
                    {
                        "name": run.name,
                        "folder": str(run.folder),
                        "seed": seed(run),
                        "state": run.state.value,
                        "steps": int(run.steps[-1]),
                        "commit": run.starts[-1].commit if run.starts else None,
                        "notes": list(run.notes),
                    }
                    for run in g.runs
                ],
                "settings": {key: values[i] for key, values in unlike.items()},
                "measures": {
                    row.measure.key: {"unit": row.measure.unit, "meaning": row.measure.meaning} | vars(row.cells[i])
                    for row in content.rows
                },
            }
            for i, g in enumerate(content.groups)
        ],
    }


def _check(options: Options) -> None:
    if options.window < 1:
        raise UserError(f"--smooth {options.window}: steps of the moving average, at least 1 (1: none)")
    if options.last < 1:
        raise UserError(f"--last {options.last}: steps that values at the end are means of, at least 1")
    if options.samples < 0:
        raise UserError(f"--samples {options.samples}: files of samples per run, at least 0")
    if options.target is not None and not 0 < options.target < float("inf"):
        raise UserError(f"--target {options.target}: an entropy in nats per token, above 0")


def _write(file: Path, text: str) -> Path:
    write_atomic(file, text)
    return file
