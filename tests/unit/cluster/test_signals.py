"""What ends a run whose parts are still being started."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest

from stare_megatron.cluster.signals import ENDS, Interrupt, handling
from tests import programs


@pytest.fixture(autouse=True)
def not_deaf() -> Iterator[None]:
    """Tests may themselves run under nohup, where SIGHUP is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ENDS)
def test_it_is_an_interrupt_until_the_handler_of_before_is_back(number):
    before = signal.getsignal(number)
    with handling(ENDS) as install:
        assert signal.getsignal(number) is before
        install(Interrupt())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_signal_that_is_said_twice_does_not_interrupt_the_cleaning_up(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("stare_megatron.cluster.signals.time.monotonic", lambda: now[0])
    with handling(ENDS) as install:
        install(Interrupt())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        now[0] += 0.5
        signal.raise_signal(signal.SIGTERM)
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_nohup_stays_deaf_to_the_terminals_end():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling(ENDS) as install:
            install(Interrupt())
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


_STARTING = """
import os, signal, time

import psutil

from stare_megatron.cluster import runtime
from stare_megatron.config import ClusterConfig

try:
    with runtime.cluster(ClusterConfig(), 1):
        started = psutil.Process().children(recursive=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except KeyboardInterrupt:
    _, alive = psutil.wait_procs(started, timeout=20)
    print("interrupted; left:", [p.name() for p in alive])
"""


@pytest.mark.parts
def test_while_engines_start_nobody_is_left_and_ray_says_nothing(tmp_path):
    """Ray's own handler would write a stack trace and abort the driver."""
    script = tmp_path / "starting.py"
    script.write_text(_STARTING)
    done = programs.run([sys.executable, script])
    assert done.stdout == "interrupted; left: []\n", done.stderr[-2000:]
    assert done.returncode == 0
    assert "SIGTERM received" not in done.stderr
