"""Who has the devices: engines sleep while the trainer works, and wake by parts around a push; ranks give way too."""

from __future__ import annotations

import pytest

from stare_megatron.errors import RunError
from stare_megatron.run.residency import Residency

ALL = ("gradients", "optimizer", "parameters")


class Both:
    """Engines and ranks, which write down what is asked of them. `dead`: an engine that cannot sleep."""

    def __init__(self, dead=False):
        self.said: list[str] = []
        self._dead = dead

    def sleep(self, timeout=0.0):
        self.said.append(f"sleep {timeout:.0f}" if timeout else "sleep")
        if self._dead:
            raise RunError("engine 0: died")

    def wake(self, part):
        self.said.append(f"wake {part}")

    def to_device(self):
        self.said.append("to device")

    def to_host(self):
        self.said.append("to host")


def made(*, shared=True, offload=(), dead=False) -> tuple[Residency, Both]:
    both = Both(dead)
    return Residency(both, both, shared=shared, offload=offload), both


def hand_over(residency: Residency, both: Both) -> None:
    with residency.to_engines():
        both.said.append("push")


def test_shared_devices_change_hands():
    residency, both = made()
    residency.to_checkpoint()  # nothing is away, nobody need sleep
    hand_over(residency, both)  # the first push: nobody sleeps yet
    for _ in range(2):
        residency.to_trainer()
        residency.to_trainer()  # has them already
        hand_over(residency, both)
    assert both.said == ["push", *["sleep", "wake weights", "push", "wake kv_cache"] * 2]


def test_ranks_give_way_between_the_push_and_the_caches():
    residency, both = made(offload=ALL)
    residency.to_checkpoint()
    residency.to_checkpoint()
    for _ in range(2):
        hand_over(residency, both)
        assert not residency.engines_sleep
        residency.to_trainer()
        assert residency.engines_sleep
    hand = ["wake weights", "push", "to host", "wake kv_cache"]
    assert both.said == ["sleep", "to device", *hand, "sleep", "to device", *hand, "sleep", "to device"]


@pytest.mark.parametrize(
    ("offload", "said"),
    [
        (["gradients"], ["push", "to host"]),
        (["optimizer"], ["sleep", "wake weights", "push", "to host", "wake kv_cache"]),
    ],
)
def test_engines_sleep_for_a_checkpoint_if_part_of_it_is_away(offload, said):
    residency, both = made(offload=offload)
    residency.to_checkpoint()
    hand_over(residency, both)
    assert both.said == said


@pytest.mark.parametrize(
    ("shared", "offload", "first"),
    [
        (True, ALL, True),
        (True, ["optimizer"], True),
        (True, ["gradients"], False),
        (True, (), False),
        (False, ALL, False),
    ],
)
def test_what_is_away_is_saved_while_engines_sleep_for_the_update(shared, offload, first):
    residency, both = made(shared=shared, offload=offload)
    assert not residency.saves_first
    residency.to_trainer()
    assert residency.saves_first is first
    hand_over(residency, both)
    assert not residency.saves_first


def test_engines_with_devices_of_their_own_never_sleep():
    residency, both = made(shared=False, offload=["optimizer"])
    residency.to_checkpoint()
    residency.to_trainer()
    hand_over(residency, both)
    with pytest.raises(RunError), residency:
        raise RunError("over")
    assert both.said == ["push", "to host"]


def test_a_push_that_fails_leaves_the_engines_without_their_cache():
    residency, both = made(offload=ALL)
    residency.to_trainer()
    with pytest.raises(RuntimeError, match="lost"), residency.to_engines():
        raise RuntimeError("lost")
    assert both.said == ["sleep", "to device", "wake weights"]


@pytest.mark.parametrize(
    ("offload", "error", "said"),
    [
        ((), RunError, []),
        (["gradients"], RunError, []),
        (ALL, RunError, ["sleep 60"]),
        (ALL, KeyboardInterrupt, []),  # the user does not want to wait
    ],
)
@pytest.mark.parametrize("dead", [False, True])
def test_engines_sleep_before_a_rescue(offload, error, said, dead):
    residency, both = made(offload=offload, dead=dead)
    with pytest.raises(error, match="over"), residency:
        raise error("over")
    assert both.said == said
    assert residency.engines_sleep is (bool(said) and not dead)
