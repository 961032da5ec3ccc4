"""`--beside=PATHS`: two lanes of tests at a time, one report. The tests of these paths run in a process beside this
one.

The other process sends its reports through a file; they are shown, counted and timed here like those of this process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--beside", default="", help="paths, separated by spaces: run these in a process beside this one")
    parser.addoption("--reports-to", help="for the process beside: the file to write reports to")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--reports-to"):
        config.pluginmanager.register(_Sender(config, Path(path)))
        return
    asked = [config.rootpath / a for a in config.args]
    beside = [
        p for p in config.getoption("--beside").split() if any((config.rootpath / p).is_relative_to(a) for a in asked)
    ]
    here = [a for a in config.args if a not in beside]
    if beside and here:
        config.option.ignore = [*(config.option.ignore or ()), *beside]
        config.pluginmanager.register(_Beside(config, beside))
        config.args = here


class _Sender:
    """What the process beside tells."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._file = path.open("w")
        self._deselected = 0

    def pytest_deselected(self, items: list[Any]) -> None:
        self._deselected += len(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._send({"collected": len(session.items), "deselected": self._deselected})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def _send(self, what: dict[str, Any]) -> None:
        self._file.write(json.dumps(what, default=str) + "\n")
        self._file.flush()


class _Beside:
    """Starts the other process, and shows its reports between the tests of this one."""

    def __init__(self, config: pytest.Config, paths: list[str]) -> None:
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="lanes-")
        self._log = Path(self._folder.name, "log")
        reports = Path(self._folder.name, "reports")
        reports.touch()
        self._reports = reports.open()
        self._line = ""
        given = [str(a) for a in config.invocation_params.args]
        options = [a for a in given if a not in config.args and not a.startswith("--beside")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, "--reports-to", str(reports), *paths],
                cwd=config.rootpath,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def pytest_sessionstart(self) -> None:
        if terminal := self._config.pluginmanager.get_plugin("terminalreporter"):
            terminal.showfspath = False  # reports of two files come by turns

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        done = yield
        self._show(item.session)
        return done

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        done = yield
        while self._process.poll() is None:
            self._show(session)
            time.sleep(0.2)
        self._show(session)
        if self._process.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            pytest.exit(f"the process beside ended:\n{self._log.read_text()[-8000:]}", returncode=1)
        return done

    def pytest_sessionfinish(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # fixtures are torn down
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reports.close()
        self._folder.cleanup()

    def _show(self, session: pytest.Session) -> None:
        while part := self._reports.readline():
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
