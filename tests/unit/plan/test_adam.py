"""Bytes and time of an optimizer whose state is kept in fewer bytes, by hand. With a rank: tests/te."""

from __future__ import annotations

from typing import Any

import pytest

from stare_megatron.config import Config
from stare_megatron.plan.estimate import make
from stare_megatron.plan.memory import Phase
from stare_megatron.plan.moves import host_memory, moves
from stare_megatron.plan.parameters import Layout, fullest, largest
from tests.configs import configuration
from tests.unit.plan.models import given_for
from tests.unit.plan.test_moves import MACHINE, RATE
from tests.unit.run.test_sizing import B7

LOSSLESS = {"precision_aware": True}
BFLOAT16 = LOSSLESS | {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
MIXED = LOSSLESS | {"exp_avg_dtype": "bfloat16"}
GRADIENTS = BFLOAT16 | {"main_grads_dtype": "bfloat16"}


def run(optimizer: dict[str, Any], dtype: str = "bfloat16", **trainer: Any) -> Config:
    table = {"world_size": 16, "tensor_parallel": 4, "optimizer": optimizer} | trainer
    return configuration(model={"dtype": dtype}, inference={"engines": 16}, trainer=table)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "state", "gradient", "copied"),
    [
        ({}, "bfloat16", 12, 4, 0),
        (LOSSLESS, "bfloat16", 2 + 8, 4, 0),
        (BFLOAT16, "bfloat16", 2 + 4, 4, 0),
        (MIXED, "bfloat16", 2 + 6, 4, 4),
        (BFLOAT16, "float16", 4 + 4, 4, 0),
        (GRADIENTS, "bfloat16", 2 + 4, 2, 0),
    ],
)
def test_bytes_a_parameter(optimizer, dtype, state, gradient, copied) -> None:
    config = run(optimizer, dtype)
    held = largest(B7, Layout.of(config.trainer), 0)
    found = fullest(B7, config.trainer, dtype)
    assert found.optimizer == state * held.owned
    assert found.gradients == gradient * held.buffer
    assert found.copied == copied * held.owned


def step(config: Config) -> float:
    """Of a rank in the update: parameters, gradients and optimizer state with what Adam makes beside it, or
    activations."""
    plan = make(config, B7, given_for(config), cures=False)
    (use,) = [u for u in plan.uses if u.phase is Phase.UPDATE]
    return sum(n for name, n in use.parts.items() if name in ("rank: weights", "rank: gradients", "rank: optimizer"))


def test_what_adam_copies_counts_in_the_step() -> None:
    table = {"micro_batch_tokens": 64, "recompute": "full"}  # hardly any activations
    mixed, held = run(MIXED, **table), fullest(B7, run(MIXED).trainer, "bfloat16")
    assert step(mixed) == pytest.approx(held.total + held.copied)
    assert step(run(BFLOAT16, **table)) == pytest.approx(fullest(B7, run(BFLOAT16).trainer, "bfloat16").total)
    bundles = run(MIXED, **table, offload=["optimizer"], offload_step_mb=2048)
    one = 2**31
    assert step(bundles) == pytest.approx(held.parameters + held.gradients + one * (1 + 4 / 8), rel=1e-3)


def test_less_state_crosses_the_bus_and_a_save_goes_through_the_host() -> None:
    config = run(BFLOAT16, offload=["optimizer"])
    assert moves(config, B7, MACHINE).update == pytest.approx(
        2 * fullest(B7, config.trainer, "bfloat16").optimizer / RATE
    )
    plain = configuration(
        trainer={"world_size": 16, "optimizer": LOSSLESS},
        checkpoint={"asynchronous": False},
        model={"dtype": "bfloat16"},
    )
    assert host_memory(plain, B7, MACHINE).saving > 0
