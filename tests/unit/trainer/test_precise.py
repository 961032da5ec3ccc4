"""The two halves of a float32 master weight. With Transformer Engine's Adam: tests/te."""

from __future__ import annotations

import torch

import stare_megatron_patches

stare_megatron_patches.apply("megatron-core")

from stare_megatron.config import OptimizerConfig  # noqa: E402
from stare_megatron.trainer.precise import divided, joined, settings  # noqa: E402

HALF = 2.0**-8  # of the step between bfloat16 numbers at 1: between two of them
EDGES = [0.0, -0.0, 1e-40, -1e-40, 3.3e38, -3.3e38, 1 + HALF, -1 - HALF, 1 + 3 * HALF, float("inf"), float("-inf")]


def test_both_halves_together_are_the_master_weight_bit_for_bit() -> None:
    torch.manual_seed(0)
    wide = torch.randn(100_000) * torch.logspace(-30, 30, 100_000)
    master = torch.cat([torch.tensor(EDGES), wide])
    upper, lower = divided(master)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(joined(upper, lower).view(torch.int32), master.view(torch.int32))


def test_the_parameter_is_the_master_weight_to_the_nearest_and_halves_away_from_zero() -> None:
    torch.manual_seed(1)
    master = torch.randn(100_000)
    upper, lower = divided(master)
    between = lower == -(2**15)
    assert torch.equal(upper[~between], master.to(torch.bfloat16)[~between])
    upper, lower = divided(torch.tensor([1 + HALF, -1 - HALF]))
    assert upper.tolist() == [1 + 2 * HALF, -1 - 2 * HALF]
    assert lower.tolist() == [-(2**15)] * 2


def test_a_parameter_alone_is_its_own_master_weight() -> None:
    """As an optimizer begins: the lower halves are zero."""
    parameter = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(joined(parameter, torch.zeros(1000, dtype=torch.int16)), parameter.float())


def test_what_upstream_is_told() -> None:
    assert settings(OptimizerConfig()) == {}
    told = settings(OptimizerConfig(precision_aware=True, exp_avg_dtype="bfloat16", main_grads_dtype="bfloat16"))
    assert told == {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.float32,
        "main_grads_dtype": torch.bfloat16,
    }
