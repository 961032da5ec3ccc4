"""Runs the jobs of a study as processes of their own, several at a time, each resumable.

What is finished is not run again; what was cut short goes on from its checkpoint. One job's failure does not stop the
others.
"""

from __future__ import annotations

import enum
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from stare_megatron.config import flatten
from stare_megatron.errors import RunError, UserError
from stare_megatron.host.exported import exported
from stare_megatron.host.signals import ALL, handling
from stare_megatron.metrics import eval_records, jsonl
from stare_megatron.study.spec import Job, Study

_POLL = 0.5  # seconds
_MEMORY_PER_JOB = 5 * 2**30  # bytes: engine, ranks and driver of a tiny model took 3.9 GiB
# Keys in which a run that goes on may differ from its earlier start.
_FREE_KEYS = frozenset({"run.resume", "run.steps"})


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    STOPPING = "stopping after its step"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass
class Progress:
    """Where a job stands: what a display needs. `note`: why it failed."""

    job: Job
    state: State = State.WAITING
    steps_before: int = 0
    note: str = ""
    rows: list[jsonl.Row] = field(default_factory=list)
    _read_bytes: int = 0

    def read(self) -> None:
        """Bring `rows` up to date. The file is parsed only when it has grown: the runs need the CPU."""
        file = self.job.config.folder / jsonl.FILE
        size = file.stat().st_size if file.is_file() else 0
        if size != self._read_bytes:
            self.rows, self._read_bytes = jsonl.read(file), size

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def steps(self) -> int:
        return self.job.config.run.steps


def default_jobs() -> int:
    """How many runs of a tiny model fit on this machine at a time: one per core, as far as memory allows."""
    return max(1, min(os.cpu_count() or 1, psutil.virtual_memory().total // _MEMORY_PER_JOB))


class Runner:
    """Runs a study.

    Args:
        study: what to run. jobs: how many at a time.
        show: called about twice a second with the progress of every job.
    """

    def __init__(self, study: Study, jobs: int, show: Callable[[list[Progress]], None]) -> None:
        self._study = study
        self._jobs = jobs
        self._show = show
        self.progress = [Progress(job) for job in study.jobs]
        self._running: dict[int, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        self._stopping = False

    def run(self) -> list[Progress]:
        """Run what is not done yet; returns the progress of every job. Ctrl-C, SIGTERM or a terminal that is closed
        ends each running one after its step.

        Raises:
            UserError: a run folder of another configuration is in the way. RunError: a command of `prepare` failed.
        """
        for p in self.progress:
            refuse_other(p.job)
            if is_done(p):
                p.state = State.DONE
        with handling(ALL) as install:
            install(self._stop)
            try:
                self._prepare()
                self._loop()
            finally:
                for process, log in self._running.values():
                    process.kill()
                    process.wait()
                    log.close()
        return self.progress

    def _prepare(self) -> None:
        for seed in sorted({p.job.seed for p in self.progress if p.state is State.WAITING}):
            for command in self._study.prepare[seed]:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if self._stopping:  # the command has heard a terminal's Ctrl-C, too
                    return
                if done.returncode:
                    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
                    raise RunError(f"prepare, seed {seed}: {' '.join(command)}: {said[-1] if said else 'failed'}")

    def _loop(self) -> None:
        waiting = [i for i, p in enumerate(self.progress) if p.state is State.WAITING]
        while waiting or self._running:
            while waiting and len(self._running) < self._jobs and not self._stopping:
                self._start(waiting.pop(0))
            if self._stopping and not self._running:
                return
            for i in list(self._running):
                self._look_after(i)
            self._show(self.progress)
            time.sleep(_POLL)
        self._show(self.progress)

    def _start(self, i: int) -> None:
        p = self.progress[i]
        log = log_file(p.job)
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = log.open("ab")
        words = ["train", str(self._study.base), "--quiet", *p.job.settings, "run.resume=auto"]
        p.read()
        p.state, p.steps_before = State.RUNNING, p.step
        process = subprocess.Popen(
            [sys.executable, "-m", "stare_megatron", *words],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it once, through us
        )
        self._running[i] = (process, handle)
        if self._stopping:  # since it was started, so that it was not told
            self._tell(i)

    def _look_after(self, i: int) -> None:
        p = self.progress[i]
        process, handle = self._running[i]
        p.read()
        code = process.poll()
        if code is None:
            return
        handle.close()
        del self._running[i]
        if code == 0:
            # Stopped at its last step, it leaves the evaluation of it out.
            p.state = State.DONE if not self._stopping or is_done(p) else State.STOPPED
        elif self._stopping:
            p.state = State.STOPPED
        else:
            lines = log_file(p.job).read_text(errors="replace").strip().splitlines()
            p.state, p.note = State.FAILED, lines[-1].strip() if lines else f"exit code {code}"

    def _stop(self, number: int, frame: Any) -> None:
        """The first signal lets every running job finish its step and save; the second ends them at once."""
        self._stopping = True
        for i in self._running:
            self._tell(i)

    def _tell(self, i: int) -> None:
        self._running[i][0].send_signal(signal.SIGINT)
        self.progress[i].state = State.STOPPING


def log_file(job: Job) -> Path:
    """Where a job's own output goes (that of its processes is in the run folder). Hidden, so that `DIR/*` are runs."""
    return job.config.run.dir / ".logs" / f"{job.name}.log"


def is_done(p: Progress) -> bool:
    """All steps logged, and the policy of the last one evaluated and exported where it is to be."""
    config, steps = p.job.config, p.steps
    p.read()
    if p.step < steps or (config.checkpoint.export_final and exported(config.folder) is None):
        return False
    table = config.folder / eval_records.TABLE
    rows = jsonl.read(table) if table.is_file() else []
    return not config.eval.wanted(steps, steps) or any(int(row["step"]) == steps for row in rows)


def refuse_other(job: Job) -> None:
    """A run's folder may be gone on with only under the settings it was begun with.

    Raises:
        UserError: it holds a run of other settings; names the first that differs.
    """
    file = job.config.folder / "config.toml"
    if not file.is_file():
        return
    found = flatten(tomllib.loads(file.read_text()))
    wanted = flatten(job.config.model_dump(mode="json"))
    for key in sorted(found.keys() | wanted.keys()):
        if key not in _FREE_KEYS and found.get(key) != wanted.get(key):
            raise UserError(
                f"{job.config.folder}: was run with {key} = {found.get(key)!r}, the study says {wanted.get(key)!r}; "
                "move the folder away or choose another dir"
            )
