"""`stare-megatron watch`: the report of one run as a page that follows it. Reads the run's files and writes none."""

from __future__ import annotations

import html
import json
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from stare_megatron.compare.arguments import PORT
from stare_megatron.compare.html import render
from stare_megatron.compare.load import PACKED, load
from stare_megatron.compare.report import REPORT, Options, gather
from stare_megatron.errors import UserError
from stare_megatron.host.files import write_atomic
from stare_megatron.host.pages import Page, PageServer, not_found
from stare_megatron.metrics import eval_records, events, jsonl
from stare_megatron.metrics.samples import FOLDER as SAMPLES
from stare_megatron.run.folder import RunFolder

_EVENTS = 5  # shown, the newest
_CHECK_S = 5.0  # what a page waits before it asks again
_STATE_S = 60.0  # after which a run whose files do not change may have been stopped


Files = tuple[tuple[str, int, int], ...]
"""Name, size and time in ns of the files that a report is made of."""


class Watcher:
    """The page and the report of a run, made again when they are asked for and its files have changed.

    `clock`: seconds since the epoch.
    """

    def __init__(self, run: Path, clock: Callable[[], float] = time.time) -> None:
        self._run = run
        self._clock = clock
        self._lock = threading.Lock()
        self._report: tuple[Files, str] | None = None
        self._about: tuple[tuple[Files, int], str] | None = None

    def answer(self, path: str) -> Page:
        """`/`: the page; `/report`: what it shows; `/state`: what it asks for all the time."""
        if path == "/":
            page = resources.files("stare_megatron.compare").joinpath("watch.html").read_text()
            name = html.escape(self._run.name)
            return Page(page.replace("{{ name }}", name).replace("{{ every }}", str(round(1000 * _CHECK_S))))
        if path == "/report":
            return Page(self.report())
        if path == "/state":
            newest = max((changed for *_, changed in files_of(self._run)), default=0)
            state = {"version": str(newest), "about": self.about(), "events": last_events(self._run)}
            return Page(json.dumps(state), "application/json")
        return not_found(path)

    def report(self) -> str:
        """HTML of the files as they are. Where there is no step yet, or a file is damaged, it says so."""
        with self._lock:
            files = files_of(self._run)
            if self._report is None or self._report[0] != files:
                self._report = files, self._rendered()
            return self._report[1]

    def _rendered(self) -> str:
        try:
            return render(gather([self._run], Options(), self._clock()))
        except UserError as e:
            return f"<!doctype html><meta charset=utf-8><title>watch</title><p>{html.escape(str(e))}</p>"

    def about(self) -> str:
        """How far it is, e.g. "step 3 of 60, running"."""
        with self._lock:
            now = self._clock()
            of = files_of(self._run), int(now // _STATE_S)
            if self._about is None or self._about[0] != of:
                self._about = of, self._described(now)
            return self._about[1]

    def _described(self, now: float) -> str:
        try:
            run = load(self._run, now)
        except UserError:
            return "no report yet"
        return f"step {run.steps[-1]}{f' of {run.planned}' if run.planned else ''}, {run.state.value}"


def files_of(run: Path) -> Files:
    folder = RunFolder(run, fresh=False)
    files = [folder.metrics, run / PACKED, run / eval_records.TABLE, folder.config, folder.record]
    files += sorted((run / SAMPLES).glob("step_*.jsonl"))
    there = ((file.name, file.stat()) for file in files if file.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in there)


def last_events(run: Path) -> list[str]:
    """The newest lines of `events.jsonl` in words; one that is being written is left out."""
    file = run / events.FILE
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    rows = [json.loads(line) for line in lines[-_EVENTS:]]
    return [
        f"{row['time'][11:19]} {row['who']}: {events.change(row['old'], row['new'])}: {row['reason']}" for row in rows
    ]


def watch(run: Path, host: str, port: int | None, say: Callable[[str], None]) -> None:
    """Serve the page of a run until Ctrl-C. `port`: None takes the usual one, or a free one where that is taken.

    Raises:
        UserError: no run there, or the port is taken.
    """
    check(run)
    watcher = Watcher(run)
    server = _listen(host, port, watcher)
    say(f"watching {run} at {server.url}  (Ctrl-C ends it)")
    try:
        server.serve()
    except KeyboardInterrupt:
        say("")
    finally:
        server.close()


def once(run: Path, out: Path) -> Path:
    """Write the report of a run as it is now to `out`, a file, or a folder that gets `report.html`.

    Raises:
        UserError: no run there, no step yet, a damaged file, or a file that cannot be written.
    """
    check(run)
    file = out if out.suffix == ".html" else out / REPORT
    text = render(gather([run], Options(), time.time()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text)
    except OSError as e:
        raise UserError(f"--once {out}: cannot write {file}: {e.strerror}") from e
    return file


def check(run: Path) -> None:
    """Raises: UserError: no run's folder."""
    folder = RunFolder(run, fresh=False)
    if not any(file.is_file() for file in (folder.record, folder.metrics, run / PACKED)):
        raise UserError(f"{run}: no run.json or {jsonl.FILE} in it; give the folder of one run, e.g. runs/NAME")


def _listen(host: str, port: int | None, watcher: Watcher) -> PageServer:
    for wanted in (PORT, 0) if port is None else (port,):
        try:
            return PageServer(host, wanted, watcher.answer)
        except OSError as e:
            why = e.strerror
    raise UserError(f"--port {port}: cannot listen there on {host} ({why}); choose another, or leave it out")
