"""`stare-megatron study`: run a study, watch it, compare its runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from stare_megatron.compare.report import Options, compare
from stare_megatron.errors import UserError
from stare_megatron.study import spec
from stare_megatron.study.display import Display, line
from stare_megatron.study.jobs import Progress, Runner, State, default_jobs, log_file

INTERRUPTED = 130


def run(file: Path, *, form: str, only: Sequence[str], jobs: int, folder: Path | None, dry_run: bool) -> int:
    """Run what is not done; returns the exit code: 0, 1 if a run failed, 130 if stopped.

    `dry_run`: only list the runs and their settings.

    Raises:
        UserError: before anything is started. RunError: a command of `prepare` failed.
    """
    if jobs < 0:
        raise UserError(f"--jobs {jobs}: runs at a time; 0: as many as fit")
    study = spec.load(file, form, only, folder)
    console = Console()
    if dry_run:
        for job in study.jobs:
            console.print(f"{job.name}: {shlex.join(job.settings)}", markup=False, highlight=False, soft_wrap=True)
        return 0
    jobs = jobs or default_jobs()
    console.print(f"{len(study.jobs)} runs in {study.folder}, {jobs} at a time", highlight=False)
    with Display(console) as display:
        progress = Runner(study, jobs, display.show).run()
    for p in progress:
        if p.state is State.FAILED:
            console.print(f"{line(p)}\n  its output: {log_file(p.job)}", markup=False, highlight=False)
    if any(p.rows for p in progress):
        console.print(f"report: {_report(study, progress)}", highlight=False, soft_wrap=True)
    states = {p.state for p in progress}
    if State.FAILED in states:
        return 1
    if states == {State.DONE}:
        return 0
    done = sum(p.state is State.DONE for p in progress)
    console.print(f"stopped: {done} of {len(progress)} runs are done; the same command goes on", highlight=False)
    return INTERRUPTED


def _report(study: spec.Study, progress: list[Progress]) -> Path:
    """Compare what has logged a step; returns the page."""
    out = study.folder.with_name(f"{study.folder.name}-report")
    # What each seed has of its own does not part a variant's runs.
    options = Options(ignore=study.by_seed, json_file=out / "numbers.json")
    return compare([p.job.config.folder for p in progress if p.rows], out, options)[0]
