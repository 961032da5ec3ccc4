"""Experts' matrices as they are when weights are loaded, read back from what vLLM's kernels compute with.

Unquantized kernels keep them in an order of their own and change no value:

    Triton                       as they are loaded
    FlashInfer's CUTLASS         up above gate instead of gate above up
    FlashInfer's TensorRT-LLM    rows in another order, columns in blocks of 128 bytes; up before gate
    vLLM's CPU kernels           packed (`cpu_engine.unpacked`)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from stare_megatron.sync.cpu_engine import unpacked

Block = tuple[slice, ...]
Reader = Callable[[Block], torch.Tensor]
"""A block of a parameter, given where it is when weights are loaded."""

Undo = Callable[[torch.Tensor], torch.Tensor]
"""One expert's matrix, [rows, columns] when it is loaded, from how it is kept."""

_BLOCK_BYTES = 128


def experts_form(module: Any, name: str) -> Reader | None:
    """Reads the parameter `name` of a `RoutedExperts` without quantization, [experts, rows, columns]; None where it
    cannot be told. One expert's matrix at a time is in memory beside what is kept."""
    undo = _undo(module, name)
    if undo is None:
        return None
    kept: torch.Tensor = getattr(module, name)
    expert = functools.lru_cache(maxsize=1)(lambda index: undo(kept[index].detach()))

    def read(block: Block) -> torch.Tensor:
        numbers = range(*block[0].indices(kept.shape[0]))
        if len(numbers) == 1:
            return expert(numbers[0])[block[1:]].unsqueeze(0)
        return torch.stack([expert(number)[block[1:]] for number in numbers])

    return read


def _undo(module: Any, name: str) -> Undo | None:
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend as Backend

    backend, gated = module.quant_method.unquantized_backend, module.moe_config.is_act_and_mul
    if backend is Backend.CPU:
        return unpacked(module, name)
    if backend in (Backend.TRITON, Backend.BATCHED_TRITON):
        return _as_it_is
    if backend is Backend.FLASHINFER_CUTLASS:
        return _halves_swapped if gated and name.startswith("w13") else _as_it_is
    if backend is Backend.FLASHINFER_TRTLLM:
        order = _orders(module.w13_weight.shape[1], module.w2_weight.shape[1], gated, module.w13_weight.device)
        return functools.partial(_out_of_blocks, order=order[0 if name.startswith("w13") else 1])
    return None


def _as_it_is(kept: torch.Tensor) -> torch.Tensor:
    return kept


def _halves_swapped(kept: torch.Tensor) -> torch.Tensor:
    up, gate = kept.chunk(2)
    return torch.cat([gate, up])


def _out_of_blocks(kept: torch.Tensor, *, order: torch.Tensor) -> torch.Tensor:
    """From [blocks of columns, rows in `order`, block]. `order`: int64 [rows]."""
    rows = kept.shape[0]
    blocks = kept.view(torch.uint8).view(-1, rows, _BLOCK_BYTES).permute(1, 0, 2)
    plain = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    plain[order] = blocks
    return plain.view(rows, -1).view(kept.dtype)


@functools.lru_cache(maxsize=4)
def _orders(gate_up: int, down: int, gated: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which row each kept one was, int64, of matrices with so many rows: found by having vLLM convert the numbers of
    the rows."""
    from vllm.model_executor.layers.quantization.utils.flashinfer_utils import (
        convert_moe_weights_to_flashinfer_trtllm_block_layout,
    )

    numbers = [_numbers(rows, device) for rows in (gate_up, down)]
    convert_moe_weights_to_flashinfer_trtllm_block_layout({}, *numbers, is_gated_act_gemm=gated)
    found = [(matrix.view(torch.int16)[0, :, 0].long() & 0xFFFF) for matrix in numbers]
    return found[0], found[1]


def _numbers(rows: int, device: torch.device) -> torch.Tensor:
    """The number of each row, of up to 2^16, in every element of one expert's matrix of one block, as bfloat16 bits."""
    numbers = torch.arange(rows, device=device).to(torch.int16).view(torch.bfloat16)
    return numbers[None, :, None].repeat(1, 1, _BLOCK_BYTES // 2)
