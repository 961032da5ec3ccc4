"""`trainer.fp8` as Transformer Engine sees it, without a GPU: its recipes, what they take, what its modules keep."""

from __future__ import annotations

import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("needs the environment of `make test-te`", allow_module_level=True)

from stare_megatron.host import device

# What Megatron-Core finds when it is imported is settled for the process.
with mock.patch.object(device, "has_transformer_engine", return_value=True):
    from stare_megatron.trainer import float8, model

from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe

from stare_megatron.config import TrainerConfig
from stare_megatron.config.float8 import BLOCKS, FORMATS
from stare_megatron.errors import UserError
from stare_megatron.trainer.sequence import SequenceLayout, padded_lengths
from tests.te.te_worker import layers
from tests.unit.plan.models import shape_of

RECIPES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}


def config(recipe: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(float8, "check_device", lambda _: None)
    with layers(engine=True):
        return model.policy_config(shape_of("qwen2.5-0.5b"), torch.bfloat16, TrainerConfig(fp8=recipe))


@pytest.mark.parametrize("recipe", FORMATS)
def test_upstream_makes_the_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = get_fp8_recipe(config(recipe, monkeypatch))
    assert type(made).__name__ == RECIPES[recipe]
    assert made.fp8_format.name == FORMATS[recipe].upper()
    # Nothing of one pass decides another's scales, and nothing has to be in a checkpoint.
    assert not made.delayed()


@pytest.mark.parametrize("recipe", FORMATS)
def test_the_layers_are_within_it_in_every_pass(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_engine.pytorch import quantization
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    monkeypatch.setattr(quantization, "check_recipe_support", lambda _: None)
    for name in ("check_fp8_support", "check_fp8_block_scaling_support", "check_mxfp8_support"):
        monkeypatch.setattr(quantization, name, lambda: (True, ""))
    made = config(recipe, monkeypatch)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), get_fp8_context(made, 0):
            assert FP8GlobalStateManager.is_fp8_enabled()
            assert type(FP8GlobalStateManager.get_fp8_recipe()).__name__ == RECIPES[recipe]
    assert not FP8GlobalStateManager.is_fp8_enabled()


@pytest.mark.parametrize("recipe", FORMATS)
def test_whole_blocks_are_taken_and_others_not(recipe: str) -> None:
    """By the quantizers' own rule; for one scale a tensor, by that of the product."""
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    shape, block = shape_of("qwen2.5-0.5b"), BLOCKS[recipe]

    def taken(rows: int, width: int) -> bool:
        tensor = torch.empty(rows, width, device="meta")
        if recipe == "tensorwise":
            try:
                assert_dim_for_fp8_exec(tensor)
            except ValueError:
                return False
            return True
        return quantizer(recipe).is_quantizable(tensor)

    for tensor, context in ((1, 1), (2, 1), (2, 2)):
        rows = sum(padded_lengths([300, 17, 1], SequenceLayout(tensor, context, 0, block))) // (tensor * context)
        # Of a rank's share under sequence parallelism, and of what is gathered from the shares.
        for width in (shape.hidden, shape.ffn, shape.heads * shape.head_dim):
            assert taken(rows, width)
            assert taken(rows * tensor, width)
    assert not taken(block // 2 + 1, shape.hidden)


def quantizer(recipe: str) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
    from transformer_engine_torch import DType

    if recipe == "mxfp8":
        return MXFP8Quantizer(fp8_dtype=DType.kFloat8E4M3)
    return Float8BlockQuantizer(fp8_dtype=DType.kFloat8E4M3, rowwise=True, columnwise=True)


def test_a_gpu_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_engine.pytorch import quantization

    made = config("mxfp8", monkeypatch)
    monkeypatch.undo()
    with (
        mock.patch.object(quantization, "check_mxfp8_support", return_value=(False, "capability 9.0")),
        pytest.raises(UserError, match=r'trainer\.fp8 = "mxfp8" does not run here: capability 9.0; choose another'),
    ):
        float8.check_device(made)
    with mock.patch.object(quantization, "check_mxfp8_support", return_value=(True, "")):
        float8.check_device(made)


def test_modules_keep_their_copies_where_they_are_dropped() -> None:
    import transformer_engine.pytorch as te

    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        module = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16, device="cpu")
    assert module._fp8_workspaces == {}
    module._fp8_workspaces["weight"] = torch.ones(2)
    float8.forget_copies([torch.nn.Sequential(module)])
    assert module._fp8_workspaces == {}
