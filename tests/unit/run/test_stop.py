"""Signals: the first asks, the second ends at once, and handlers are put back."""

from __future__ import annotations

import os
import signal
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
