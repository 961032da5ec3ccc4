"""Processes seen from outside: busy in C code that keeps Python's lock, stopped, and such as know nothing of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from stare_megatron.host import processes, stacks

# A regular expression that backtracks for longer than anybody waits, in C and with the interpreter's lock.
BUSY = """
import re, subprocess, sys, threading
from stare_megatron.host.stacks import write_stacks_on_signal
write_stacks_on_signal()

def backtrack():
    re.match("(a+)+b", "a" * 64)

child = subprocess.Popen(["sleep", "600"])
print("ready", flush=True)
backtrack()
"""


@contextmanager
def running(code: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file)
    try:
        until = time.monotonic() + 300
        while "ready" not in log.read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        yield process
    finally:
        processes.end(processes.under([process.pid]), 0.0)
        process.wait()


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with running(BUSY, tmp_path / "log") as process:
        yield process


def test_a_process_that_keeps_pythons_lock_writes_its_stacks(busy):
    (sleeper,) = psutil.Process(busy.pid).children()
    until = time.monotonic() + 120
    while sleeper.status() != psutil.STATUS_SLEEPING and time.monotonic() < until:
        time.sleep(0.05)
    (tree,) = processes.examine([busy.pid]).trees.values()
    parent, child = tree.processes
    assert " in backtrack" in parent.stacks
    assert "ready" not in parent.stacks
    assert parent.status == psutil.STATUS_RUNNING
    assert parent.bytes > 1 << 20
    assert "ready" in tree.log
    # The signal would end it.
    assert child.parent == busy.pid
    assert child.stacks == ""
    assert child.status == psutil.STATUS_SLEEPING
    assert busy.poll() is None


def test_a_stopped_process_is_seen_and_ended_with_all_under_it(busy):
    psutil.Process(busy.pid).suspend()
    until = time.monotonic() + 120
    while psutil.Process(busy.pid).status() != psutil.STATUS_STOPPED and time.monotonic() < until:
        time.sleep(0.05)
    ((pid, tree),) = processes.examine([busy.pid]).trees.items()
    assert pid == busy.pid
    assert tree.processes[0].status == psutil.STATUS_STOPPED
    assert tree.processes[0].stacks == ""
    child = psutil.Process(tree.processes[1].pid)
    processes.end(processes.under([busy.pid]), 0.0)
    assert busy.wait(120) == -signal.SIGKILL
    child.wait(120)


def test_a_process_that_is_gone_is_an_empty_tree():
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert processes.examine([gone.pid]).trees[gone.pid].processes == ()


def test_the_machines_state_has_memory_and_load():
    assert "GiB used" in processes.machine_text()
    assert "load " in processes.machine_text()


def test_this_process_knows_its_threads():
    mine = next(t for t in stacks.thread_stacks() if t.name == "MainThread")
    here = next(frame for frame in mine.frames if frame.function == "test_this_process_knows_its_threads")
    assert here.file == __file__
    called = mine.frames[: mine.frames.index(here)]
    assert [frame.function for frame in called][-1] == "thread_stacks"
