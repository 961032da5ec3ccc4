"""Parameters as they are when weights are loaded, read back from what an engine's modules compute with."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from stare_megatron.sync.experts import Reader, experts_form


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a module of vLLM's keeps its weights otherwise than they are loaded, by a quantization."""
    method = module.quant_method if hasattr(module, "quant_method") else None
    return isinstance(method, QuantizeMethodBase) and not type(method).__name__.startswith("Unquantized")


@torch.no_grad()
def loaded_form(module: torch.nn.Module, name: str) -> Reader | None:
    """Reads blocks of the parameter `name` of a module as it is when weights are loaded, from what the module computes
    with; None where that cannot be told."""
    if isinstance(module, RoutedExperts):
        return experts_form(module, name)
    if name == "weight" and isinstance(module, LinearBase | ParallelLMHead):
        return used_weight(module).__getitem__
    return getattr(module, name).__getitem__


def used_weight(module: Any) -> torch.Tensor:
    """The matrix the module multiplies with, [outputs, inputs].

    On CPUs that is a packed copy behind `cpu_linear`. Multiplying the identity by it gives every element exactly (a
    sum of one value and zeros), so this is what the engine uses, not what it was sent.
    """
    if "cpu_linear" not in module.__dict__:
        return module.weight
    split = hasattr(module, "input_size_per_partition")  # not of a layer that all workers have whole
    inputs = module.input_size_per_partition if split else module.input_size
    identity = torch.eye(inputs, dtype=module.params_dtype, device=module.weight.device)
    return module.cpu_linear(identity, module.weight, None).t()
