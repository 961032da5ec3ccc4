"""`--beside=PATHS --shared=PATHS --lanes=N`: N lanes of tests at a time, one report. The tests of `beside` run in a
process beside this one. Those of `shared` run last, a file at a time in whichever lane comes to it first; each lane
begins at another place. Lanes beyond the second have the shared ones alone.

The other processes send their reports through a file each; they are shown, counted and timed here like those of this
process. A file is taken by making a file of its own in a folder that all lanes know.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Some lanes on two cores, with ranks and engines beside them: threads of one operation that wait for each other cost
# more than they bring. Before torch is imported, and for all that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--beside", default="", help="paths, separated by spaces: run these in a process beside this one")
    parser.addoption("--shared", default="", help="paths, separated by spaces: run each file in the lane that is free")
    parser.addoption("--lanes", type=int, default=2, help="how many, this one among them (default: 2)")
    parser.addoption("--lane", type=int, default=0, help="for the processes beside: which of them this is, from 1")
    parser.addoption("--lane-of", type=Path, help="for the processes beside: the folder where lanes meet")


def pytest_collection_finish(session: pytest.Session) -> None:
    # What has been imported stays; each full collection would go through all of it again.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions in C++ look at the end for what nobody has freed


def pytest_configure(config: pytest.Config) -> None:
    asked = [config.rootpath / a for a in config.args]

    def given(option: str) -> list[str]:
        paths = config.getoption(option).split()
        return [p for p in paths if any((config.rootpath / p).is_relative_to(a) for a in asked)]

    shared = given("--shared")
    if folder := config.getoption("--lane-of"):
        of_all = _Shared(config, shared, folder)
        config.pluginmanager.register(of_all)
        config.pluginmanager.register(_Sender(config, folder, of_all))
        return
    beside = given("--beside")
    here = [a for a in config.args if a not in beside]
    if shared or (beside and here):
        config.option.ignore = [*(config.option.ignore or ()), *beside]
        others = _Beside(config, beside, shared)
        config.pluginmanager.register(others)
        config.pluginmanager.register(_Shared(config, shared, others.folder))
        config.args = here


class _Shared:
    """Tests of which any lane takes a file when it comes to it."""

    def __init__(self, config: pytest.Config, paths: Sequence[str], folder: Path) -> None:
        self._paths = [config.rootpath / p for p in paths]
        self._folder = folder
        self._begins = config.getoption("--lane") / config.getoption("--lanes")  # where among the files
        self._taken: dict[Path, bool] = {}  # of the files met so far: whether this lane runs them

    def has(self, item: pytest.Item) -> bool:
        return any(item.path.is_relative_to(p) for p in self._paths)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files: dict[Path, list[pytest.Item]] = {}
        for item in filter(self.has, items):
            files.setdefault(item.path, []).append(item)
        order = list(files.values())
        first = int(len(order) * self._begins)
        order = order[first:] + order[:first]
        items[:] = [i for i in items if not self.has(i)] + [i for file in order for i in file]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not self.has(item):
            return None
        if item.path not in self._taken:
            self._taken[item.path] = self._take(item.path)
        if self._taken[item.path]:
            return None
        item.session._setupstate.teardown_exact(nextitem)  # as after a test that ran
        return True

    def _take(self, path: Path) -> bool:
        try:
            (self._folder / hashlib.sha256(bytes(path)).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _reports(folder: Path, lane: int) -> Path:
    return folder / f"reports-{lane}"


class _Sender:
    """What a process beside tells. What is shared is counted by the first process, which collects it too."""

    def __init__(self, config: pytest.Config, folder: Path, shared: _Shared) -> None:
        self._config = config
        self._shared = shared
        self._file = _reports(folder, config.getoption("--lane")).open("w")
        self._deselected = 0

    def _own(self, items: Sequence[pytest.Item]) -> int:
        return sum(not self._shared.has(item) for item in items)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._deselected += self._own(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._send({"collected": self._own(session.items), "deselected": self._deselected})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def _send(self, what: dict[str, Any]) -> None:
        self._file.write(json.dumps(what, default=str) + "\n")
        self._file.flush()


class _Beside:
    """Starts the other processes, and shows their reports between the tests of this one."""

    def __init__(self, config: pytest.Config, beside: list[str], shared: list[str]) -> None:
        self._config = config
        self._temporary = tempfile.TemporaryDirectory(prefix="lanes-")
        self.folder = Path(self._temporary.name)
        lanes = range(1, config.getoption("--lanes") if shared else 2)
        self._lanes = [_Lane(config, i, self.folder, [*(beside if i == 1 else ()), *shared]) for i in lanes]

    def pytest_sessionstart(self) -> None:
        if terminal := self._config.pluginmanager.get_plugin("terminalreporter"):
            terminal.showfspath = False  # reports of several files come by turns

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        done = yield
        self._show(item.session)
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        done = yield
        while any(lane.runs() for lane in self._lanes):
            self._show(session)
            time.sleep(0.2)
        self._show(session)
        for lane in self._lanes:
            lane.check()
        return done

    def pytest_sessionfinish(self) -> None:
        for lane in self._lanes:
            lane.end()
        self._temporary.cleanup()

    def _show(self, session: pytest.Session) -> None:
        for lane in self._lanes:
            lane.show(session)


class _Lane:
    """One of the other processes."""

    def __init__(self, config: pytest.Config, number: int, folder: Path, paths: Sequence[str]) -> None:
        self._config = config
        self._log = folder / f"log-{number}"
        reports = _reports(folder, number)
        reports.touch()
        self._told = reports.open()
        self._line = ""
        given = [str(a) for a in config.invocation_params.args]
        options = [a for a in given if a not in config.args and not a.startswith("--beside")]
        options += [f"--lane-of={folder}", f"--lane={number}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *paths],
                cwd=config.rootpath,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def runs(self) -> bool:
        return self._process.poll() is None

    def check(self) -> None:
        fine = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self._process.returncode not in fine:
            pytest.exit(f"a process beside ended:\n{self._log.read_text()[-8000:]}", returncode=1)

    def end(self) -> None:
        if self.runs():
            self._process.send_signal(signal.SIGINT)  # fixtures are torn down
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._told.close()

    def show(self, session: pytest.Session) -> None:
        while part := self._told.readline():
            self._line += part
            if not part.endswith("\n"):
                return
            told, self._line = json.loads(self._line), ""
            if "collected" in told:
                session.testscollected += told["collected"]
                session.config.hook.pytest_deselected(items=[SimpleNamespace()] * told["deselected"])
                continue
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=told)
            if isinstance(report.longrepr, list):  # where a test was skipped: JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            self._config.hook.pytest_runtest_logreport(report=report)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
