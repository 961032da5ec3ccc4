"""A kernel of vLLM's for CPUs, mended: without it drafts are checked at temperatures out of unwritten memory."""

from __future__ import annotations

import torch


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Give each token of a request the request's value: `output` [tokens], `input_val` [requests] of the same dtype,
    `cu_num_tokens` [requests] the tokens of all requests up to each. Values `replace_from` become `replace_to`.

    As vLLM's Triton kernel does (`rejection_sampler.expand_kernel`). Its stand-in for CPUs writes integers of 64 bits,
    and for any other dtype into a copy that it drops (vLLM issue 55005, open in September 2026).
    """
    values = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    output[: int(counts.sum())] = values.repeat_interleave(counts)


def mend() -> None:
    """In this process; before vLLM's worker is made, which registers the kernels. Does nothing on a GPU."""
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        from vllm.utils import cpu_triton_utils

        cpu_triton_utils._expand_kernel_impl = expand
