"""What vLLM's CPU build keeps of weights beside the parameters, and does not refresh by itself when they change.

Each function does nothing on GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def repack_tied_heads(model: torch.nn.Module, *, packed: bool) -> None:
    """Refresh what an LM head keeps of the embedding it is tied to.

    vLLM's CPU GEMM multiplies with a packed copy made by `process_weights_after_loading`. A reload reaches the
    embedding's module only, so a tied head would go on with the old weights. `packed`: the embedding's own copy, which
    nothing multiplies with, was made of the new weights; the head then takes that one.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(model.modules())
    embeddings = {
        id(m.weight): m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)
    }
    for module in modules:
        if isinstance(module, ParallelLMHead) and id(module.weight) in embeddings:
            drop_packed(module)
            made = vars(embeddings[id(module.weight)])
            if packed and "cpu_linear" in made:
                module.cpu_linear = made["cpu_linear"]
            else:
                module.quant_method.process_weights_after_loading(module)


def drop_packed(module: torch.nn.Module) -> None:
    """Forget the packed copy of a matrix, of which the module is about to make another: there is memory for one."""
    vars(module).pop("cpu_linear", None)


def drop_embeddings(model: torch.nn.Module) -> None:
    """Forget the packed copies of embeddings, which vLLM's CPU build makes of every one when it loads weights, in case
    that it serves as the head. The model has heads of its own: nothing multiplies with them."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            drop_packed(module)


def repack_experts(model: torch.nn.Module) -> None:
    """See to it that experts that are loaded again are packed again.

    vLLM packs (and pads) them for its CPU kernel where it makes the kernel, which it does for the first weights only
    (`UnquantizedFusedMoEMethod._setup_kernel`): later ones would be used as they come, or not fit. Once is enough.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method: Any = module.quant_method if isinstance(module, RoutedExperts) else None
        if isinstance(method, UnquantizedFusedMoEMethod) and "process_weights_after_loading" not in vars(method):
            method.process_weights_after_loading = functools.partial(_process, method)


def _process(method: Any, layer: torch.nn.Module) -> None:
    type(method).process_weights_after_loading(method, layer)
    method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def unpacked(module: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes of an expert's matrix of the parameter `name`, as vLLM's CPU kernel multiplies with it, that which was
    loaded, [rows, columns]; None where that cannot be told."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    experts = module.quant_method.moe_kernel.fused_experts
    if not isinstance(experts, CPUUnquantizedExperts) or experts._use_zentorch:
        return None
    kept: torch.Tensor = getattr(module, name)
    order = _packing(tuple(kept.shape[1:]), kept.dtype, experts.isa)
    size = experts.moe_config.intermediate_size_per_partition

    def undo(packed: torch.Tensor) -> torch.Tensor:
        plain = torch.empty_like(packed).flatten()
        plain[order] = packed.flatten()
        plain = plain.view(packed.shape)
        if name.startswith("w2"):
            return plain[:, :size]
        padded = plain.shape[0] // 2
        return torch.cat([plain[:size], plain[padded : padded + size]])

    return undo


@functools.lru_cache(maxsize=4)
def _packing(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> torch.Tensor:
    """Where each element of a packed matrix was before, int64: found by packing numbers."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    numbers = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(1, *shape)
    if dtype.itemsize == 4:
        return cpu_prepack_moe_weight(numbers.view(dtype), isa).view(torch.int32).flatten().long()
    low, high = (
        cpu_prepack_moe_weight(half.contiguous().view(dtype), isa).view(torch.int16).flatten().long() & 0xFFFF
        for half in numbers.view(torch.int16).view(*numbers.shape, 2).unbind(-1)
    )
    return low | high << 16
