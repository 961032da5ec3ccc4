"""Runs a part in a process of its own with a time limit, and makes a result of however it ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tools.gpu_check_parts import outcome
from tools.gpu_check_parts.outcome import Status

LOG = "log.txt"
STOPPED = "ended by a signal to gpu_check"
GRACE_S = 10.0  # between the request to end and the end
_LINES = 12
_TAIL_BYTES = 16_384


@dataclass(frozen=True)
class Result:
    """How a part ended. `seconds`: wall time of its process; `log`: where its output is."""

    part: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    log: str = ""


def run(
    part: str,
    command: Sequence[str],
    folder: Path,
    seconds: float,
    environment: Mapping[str, str],
    root: Path,
    stop: threading.Event,
) -> Result:
    """Run `command`, which writes `outcome.FILE` into `folder`, in a session of its own; what it left running ends with
    it. `root`: its working directory; `stop`: it is to end at once."""
    folder.mkdir(parents=True, exist_ok=True)
    answer, log = folder / outcome.FILE, folder / LOG
    answer.unlink(missing_ok=True)
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=root,
            start_new_session=True,
        )
        family = _Family(process.pid)
        done = _wait(process, family, began + seconds, stop)
        family.end()
        code = process.wait()
    took = time.monotonic() - began
    status, reason, numbers = _judge(answer, code)
    if not done and stop.is_set():
        status, reason = Status.FAILED, STOPPED
    elif not done:
        status, reason = Status.TIMED_OUT, f"not done after {seconds:.0f} s"
    if status in (Status.FAILED, Status.TIMED_OUT):
        reason = "\n".join([reason, *(f"| {line}" for line in last_lines(log))])
    return Result(part, status, round(took, 1), reason, numbers, str(log))


def _wait(process: subprocess.Popen[bytes], family: _Family, until: float, stop: threading.Event) -> bool:
    """Whether it ended by itself in time."""
    while process.poll() is None:
        if stop.is_set() or time.monotonic() > until:
            return False
        family.look()
        time.sleep(0.1)
    return True


def _judge(answer: Path, code: int) -> tuple[Status, str, dict[str, Any]]:
    if code < 0:
        return Status.FAILED, f"ended by signal {_signal(-code)}", {}
    if code:
        return Status.FAILED, f"ended with code {code}", {}
    try:
        found = outcome.parse(answer.read_text())
    except FileNotFoundError:
        return Status.FAILED, "ended without an outcome", {}
    except ValueError as e:
        return Status.FAILED, f"left an outcome that cannot be read: {e}", {}
    return found.status, found.reason, found.numbers


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def last_lines(log: Path, count: int = _LINES) -> list[str]:
    """Of a log that may hold anything: its last lines that are not empty, without control characters."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = (
        re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[^\x20-\x7e\u00a0-\uffff\t]", "", line).rstrip() for line in text.split("\n")
    )
    return [line[-300:] for line in lines if line][-count:]


class _Family:
    """A process and those that came from it, also by way of ones that have ended: Ray's and vLLM's begin sessions of
    their own, and are not reached by the group."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: dict[int, psutil.Process] = {}
        self.look()

    def look(self) -> None:
        """Note the descendants there are now."""
        for pid in [self._pid, *self._seen]:
            try:
                for child in psutil.Process(pid).children(recursive=True):
                    self._seen.setdefault(child.pid, child)
            except psutil.Error:
                continue

    def end(self) -> None:
        """If the first process lives, ask its group to end and give all GRACE_S to clean up; then kill what is left."""
        self.look()
        if self._alive(self._pid):
            self._signal_group(signal.SIGTERM)
            until = time.monotonic() + GRACE_S
            while any(map(self._alive, [self._pid, *self._seen])) and time.monotonic() < until:
                self.look()
                time.sleep(0.1)
        for child in self._seen.values():
            try:
                child.kill()  # psutil makes sure that the number is still that process's
            except psutil.Error:
                continue
        self._signal_group(signal.SIGKILL)
        psutil.wait_procs(list(self._seen.values()), timeout=GRACE_S)

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._pid, number)
        except (ProcessLookupError, PermissionError):  # nobody is left in it
            return

    @staticmethod
    def _alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False
