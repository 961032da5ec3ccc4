"""A node's part of a job, with a process that sleeps in place of Ray's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from stare_megatron.launch import node
from stare_megatron.launch.node import STOPPED, Node, Part

# Says that it is there, and ends as a run does: after the step.
DRIVER = (
    "import signal, sys, time, pathlib\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
    "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(900)"
)


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return Part(0, "localhost", 1, 1, 0, 1, "", tmp_path, tmp_path / "run.toml")


@pytest.fixture
def ray():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
    yield process
    process.kill()
    process.wait()


def once(file: Path, do) -> None:
    """In a thread: as soon as the file is there."""

    def wait() -> None:
        while not file.exists():
            time.sleep(0.02)
        do()

    threading.Thread(target=wait, daemon=True).start()


def test_a_stop_file_has_the_run_end(part: Part, ray) -> None:
    up = part.state / "up"
    once(up, (part.state / "stop").touch)
    assert Node(part)._call([sys.executable, "-c", DRIVER, str(up)], ray) == 130
    assert ray.poll() is None


def test_so_does_the_end_of_ray(part: Part, ray) -> None:
    up = part.state / "up"
    once(up, ray.kill)
    assert Node(part)._call([sys.executable, "-c", DRIVER, str(up)], ray) == 130


def test_what_knows_no_sigterm_is_stopped_all_the_same(part: Part, ray) -> None:
    (part.state / "stop").touch()
    mine = Node(part)
    assert mine._call([sys.executable, "-c", "import time; time.sleep(900)"], ray) == STOPPED
    assert mine._call([sys.executable, "-c", "raise SystemExit(3)"], ray) == STOPPED  # and nothing after it starts


def test_a_run_s_own_code_is_passed_on(part: Part, ray) -> None:
    assert Node(part)._call([sys.executable, "-c", "raise SystemExit(2)"], ray) == 2
    assert Node(part)._call([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], ray) == 1


def test_others_follow_the_first(part: Part, ray) -> None:
    mine = Node(part)
    threading.Timer(0.3, lambda: mine._end(0)).start()
    assert mine._follow(ray) == 0
    assert part.code_file.read_text() == "0\n"


def test_ray_s_processes_are_deaf_and_end_with_the_node(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that they start."""
    started = subprocess.Popen
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {DRIVER!r}, sys.argv[1]]).wait()"

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        assert command[:4] == [sys.executable, "-m", "ray.scripts.scripts", "start"]
        return started([sys.executable, "-c", code, str(part.state / "up")], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(node.subprocess, "Popen", start)
    ray = node._start_ray(part)
    while not (part.state / "up").exists():
        time.sleep(0.02)
    [child] = psutil.Process(ray.pid).children()
    for pid in (ray.pid, child.pid):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    assert ray.poll() is None
    assert child.is_running()
    node._kill(ray)
    deadline = time.monotonic() + 120
    while child.is_running() and child.status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.02)
