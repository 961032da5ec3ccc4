"""Who has the devices: engines sleep while the trainer works, and wake by parts around a push."""

from __future__ import annotations

import pytest

from stare_megatron.run.residency import Residency


class Engines:
    def __init__(self):
        self.said: list[str] = []

    def sleep(self):
        self.said.append("sleep")

    def wake(self, part):
        self.said.append(f"wake {part}")


def hand_over(residency: Residency, engines: Engines) -> None:
    with residency.to_engines():
        engines.said.append("push")


def test_shared_devices_change_hands():
    engines = Engines()
    residency = Residency(engines, shared=True)
    hand_over(residency, engines)  # the first push: nobody sleeps yet
    for _ in range(2):
        residency.to_trainer()
        residency.to_trainer()  # has them already
        hand_over(residency, engines)
    assert engines.said == ["push", *["sleep", "wake weights", "push", "wake kv_cache"] * 2]


def test_engines_with_devices_of_their_own_never_sleep():
    engines = Engines()
    residency = Residency(engines, shared=False)
    residency.to_trainer()
    hand_over(residency, engines)
    assert engines.said == ["push"]


def test_a_push_that_fails_leaves_the_engines_without_their_cache():
    engines = Engines()
    residency = Residency(engines, shared=True)
    residency.to_trainer()
    with pytest.raises(RuntimeError, match="lost"), residency.to_engines():
        raise RuntimeError("lost")
    assert engines.said == ["sleep", "wake weights"]
