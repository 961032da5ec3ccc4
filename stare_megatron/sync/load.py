"""Boxes into the parameters of a model that runs."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import torch

from stare_megatron.models.boxes import Box
from stare_megatron.sync.bake import Need, Needs
from stare_megatron.sync.cpu_engine import drop_embeddings, drop_packed, repack_experts, repack_tied_heads


def abandon(modules: Iterable[torch.nn.Module]) -> None:
    """Give up reloads of these modules that vLLM has begun and not ended: each gets back what it computed with."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    for module in modules:
        info = get_layerwise_info(module)
        if info.kernel_tensors is not None:
            _place_kernel_tensors(module, info)
        info.reset()


class Loader:
    """Takes one push. Values go into the parameter that the model computes with where that is how it is loaded;
    otherwise, as for the packed matrices of vLLM's CPU build, into a fresh one, which the module's own
    `process_weights_after_loading` turns into what is kept, as soon as it is complete.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any, needs: Needs) -> None:
        self._model = model
        self._model_config = model_config
        self._needs = needs
        self._modules = dict(model.named_modules())
        self._left: dict[str, int] = collections.Counter()
        self._covered: dict[tuple[str, str], int] = collections.Counter()
        for need in needs.cut:
            self._left[need.target.module] += need.box.elements
            self._covered[need.target.module, need.target.parameter] += need.box.elements
        self._in_place = {path for path in self._left if self._is_in_place(path)}
        self._open: set[str] = set()
        self._heads = _has_heads(model)
        self._staged: dict[str, tuple[torch.Tensor, int]] = {}
        repack_experts(model)
        if self._heads:
            drop_embeddings(model)

    def start(self) -> None:
        """Ready the modules that take whole tensors."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        for path in self._needs.modules:
            initialize_layerwise_reload(self._modules[path])

    @torch.no_grad()
    def take(self, need: Need, box: Box, value: torch.Tensor) -> None:
        """`value`: of `box`, a part of what `need` is."""
        target, path = need.target, need.target.module
        module = self._modules[path]
        if path not in self._in_place and path not in self._open:
            self._begin(path, module)
        parameter: torch.Tensor = getattr(module, target.parameter)
        parameter.data[target.where].view(need.box.shape)[box.within(need.box)].copy_(value)
        self._left[path] -= box.elements
        if not self._left[path]:
            self._complete(path, module)

    @torch.no_grad()
    def take_whole(self, number: int, box: Box, value: torch.Tensor) -> None:
        """`value`: of `box`, a part of the whole tensor that is number `number` of those needed."""
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        spec = self._needs.whole[number]
        staged, left = self._staged.pop(spec.name, (None, 0))
        if staged is None:
            staged = torch.empty(spec.shape, dtype=spec.dtype, device=value.device)
            left = staged.numel()
        staged[tuple(slice(b, e) for b, e in zip(box.begin, box.end, strict=True))].copy_(value)
        left -= box.elements
        if left:
            self._staged[spec.name] = staged, left
            return
        load: Any = self._model.load_weights
        with disable_mtp_completeness_check():
            load([(spec.name, staged)])

    def abandon(self) -> None:
        """Give the push up: modules that are half loaded get back what they had; others may have new weights."""
        abandon([self._modules[path] for path in (*self._open, *self._needs.modules)])
        self._open.clear()

    def finish(self) -> None:
        """Put all to use.

        Raises:
            RuntimeError: something has not come.
        """
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        missing = [*(path for path, left in self._left.items() if left), *self._staged]
        if missing:
            raise RuntimeError(f"the weights of {missing[0]} (and {len(missing) - 1} more) have not come completely")
        for path in self._needs.modules:
            finalize_layerwise_reload(self._modules[path], self._model_config)
        for module in self._modules.values():
            if is_deferred_attention_layer(module):
                process: Any = module.process_weights_after_loading
                process(self._model_config.dtype)
        repack_tied_heads(self._model, packed=False)

    def _is_in_place(self, path: str) -> bool:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        module: Any = self._modules[path]
        method = module.quant_method if hasattr(module, "quant_method") else None
        if method is not None and type(method) not in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            return False
        loaded, _ = get_layerwise_info(module).restore_metadata
        kept = dict(module.named_parameters(recurse=False))
        return all(
            name in kept and _layout(kept[name]) == _layout(tensor) and kept[name].is_contiguous()
            for name, tensor in loaded.items()
        )

    def _begin(self, path: str, module: torch.nn.Module) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta
        from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

        self._open.add(path)
        info = get_layerwise_info(module)
        info.kernel_tensors = get_layer_params_buffers(module)
        info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
        restore_layer_on_meta(module, info)
        materialize_layer(module, info)
        for name, parameter in module.named_parameters(recurse=False):
            if name in info.restore_metadata[0] and self._covered[path, name] < parameter.numel():
                parameter.data.zero_()  # padding

    def _complete(self, path: str, module: Any) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info

        if path in self._open:
            self._open.remove(path)
            drop_packed(module)
            _layerwise_process(module, get_layerwise_info(module))
        elif isinstance(module, ParallelLMHead) or (isinstance(module, VocabParallelEmbedding) and not self._heads):
            # For vLLM's CPU build, which packs every embedding, in case that it serves as the head.
            drop_packed(module)
            module.quant_method.process_weights_after_loading(module)


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _has_heads(model: torch.nn.Module) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return any(isinstance(module, ParallelLMHead) for module in model.modules())
