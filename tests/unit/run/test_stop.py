"""Signals: the first asks, the second ends at once, and handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from stare_megatron.run.stop import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_asks_its_echo_says_nothing_and_the_second_ends(number, monkeypatch):
    now = [7.0]
    monkeypatch.setattr("stare_megatron.run.stop.time", SimpleNamespace(monotonic=lambda: now[0]))
    notes: list[str] = []
    stop = StopSignal(notes.append)
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    restored = signal.signal(number, before)  # the tests themselves may run under nohup, which stays in force
    with stop.installed():
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        os.kill(os.getpid(), number)  # the group's, passed on by a wrapper
        assert notes == ["stopping after this step; once more to stop at once"]
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.signal(number, restored) is before


def test_who_waits_is_told():
    stop = StopSignal(lambda _: None)
    told: list[str] = []
    with stop.calling(lambda: told.append("before")):
        pass
    with stop.installed(), stop.calling(lambda: told.append("within")):
        signal.raise_signal(signal.SIGTERM)
        assert told == ["within"]
    with stop.calling(lambda: told.append("after")):
        assert told == ["within", "after"]


def test_a_thread_installs_nothing():
    """Python delivers signals to the main thread only: a run in a thread is ended by its caller."""
    stop, found = StopSignal(lambda _: None), []

    def run():
        with stop.installed():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal(lambda _: None)
        with stop.installed():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


# A Ctrl-C at the moment when a module is looked for, and what was loaded when the command began.
INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.meta_path.insert(0, Finder())
from stare_megatron.__main__ import main
print(*sorted(name for name in sys.modules if name.startswith("stare_megatron.")))
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("module", ["stare_megatron.chat.arguments", "numpy._core._multiarray_umath", "torch"])
def test_ctrl_c_while_modules_are_imported(module, tmp_path):
    words = ["make-tiny-model", "--out", str(tmp_path / "made")]
    command = [sys.executable, "-c", INTERRUPTED, module, "SIGINT", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (130, "stare-megatron: interrupted\n")
    # Of what is loaded before anyone hears a Ctrl-C there is as little as can be.
    host = ["stare_megatron.host", *(f"stare_megatron.host.{name}" for name in ("completion", "paths", "program"))]
    assert done.stdout.split() == sorted(["stare_megatron.__main__", "stare_megatron.errors", *host])


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_sigterm_ends_a_run_as_ctrl_c_does_before_it_is_one(command, number):
    """From its first import, so that nothing that it begins later is left."""
    words = [sys.executable, "-c", INTERRUPTED, "stare_megatron.config", number, command, "run.toml"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (130, "stare-megatron: interrupted\n")
