"""`trainer.fp8`: Transformer Engine's float8 in the layers of the trainer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig

from stare_megatron.errors import UserError


def check_device(config: TransformerConfig) -> None:
    """Raises: UserError: the recipe is not for this GPU, or not in this Transformer Engine."""
    from transformer_engine.pytorch.quantization import check_recipe_support  # pyright: ignore[reportMissingImports]

    try:
        check_recipe_support(get_fp8_recipe(config))
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'trainer.fp8 = "{config.fp8_recipe}" does not run here: {e}; choose another, or "none"') from e


def forget_copies(chunks: Iterable[torch.nn.Module]) -> None:
    """Drop the weights in float8, as they are and transposed, that Transformer Engine's modules keep from the first
    micro-batch of a pass on (module/base.py). The next pass makes them anew."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        vars(module).get("_fp8_workspaces", {}).clear()
