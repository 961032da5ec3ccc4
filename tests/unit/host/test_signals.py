"""What ends a run whose parts are still being started."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from stare_megatron.host.signals import ALL, ENDS, Interrupt, handling, interruptible, undisturbed


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
    monkeypatch.setattr("stare_megatron.host.signals.time.monotonic", lambda: now[0])
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


@pytest.mark.parametrize("number", ALL)
def test_a_command_that_is_interruptible_ends_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", ALL)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_no_signal_disturbs_the_cleaning_up(number, error):
    """Of which something else would be left."""
    before = signal.getsignal(number)
    said, ended = [], []

    def end(name):
        signal.raise_signal(number)
        ended.append(name)

    with pytest.raises(error) if error else contextlib.nullcontext():  # noqa: SIM117
        with undisturbed(said.append, "ending engines") as stack:
            for name in ("Ray", "engines"):
                stack.callback(end, name)
            if error:
                raise error
    assert ended == ["engines", "Ray"]
    assert said == ["ending engines", *["ending engines; a moment"] * 2]
    assert signal.getsignal(number) is before
