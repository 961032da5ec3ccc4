"""Parts that call one operator of each library with GPU code: whether it loads, whether a thinned copy still serves."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch

from stare_megatron.host import device
from tools.gpu_check_parts.outcome import Context, Outcome, skipped

NO_GPU = "needs a GPU"
_TOLERANCE = 0.03  # of values of size 1, in bfloat16


def vllm(context: Context) -> Outcome:
    """`silu_and_mul` of `_C`, `topk_softmax` of `_moe_C` where it is there."""
    if not context.on_gpu:
        return skipped(NO_GPU)
    if importlib.util.find_spec("vllm") is None:
        return skipped("vLLM is not installed")
    from vllm import _custom_ops

    outcome, operators = Outcome(), _operators()
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(64, 256, device="cuda", dtype=torch.bfloat16)
    operators._C.silu_and_mul(out, x)
    gate, up = x.float().chunk(2, dim=-1)
    outcome.near("_C: silu_and_mul", _largest(out.float() - torch.nn.functional.silu(gate) * up), 0.0, 2 * _TOLERANCE)
    if not hasattr(operators._moe_C, "topk_softmax"):
        outcome.numbers["_moe_C"] = "not there: no mixtures of experts"
        return outcome
    gating = torch.randn(64, 16, device="cuda")
    weights = torch.empty(64, 4, device="cuda")
    ids, source = (torch.empty(64, 4, device="cuda", dtype=torch.int32) for _ in range(2))
    _custom_ops.topk_softmax(weights, ids, source, gating)
    want = gating.softmax(-1).topk(4).values
    outcome.near("_moe_C: topk_softmax", _largest(weights - want), 0.0, 1e-5)
    return outcome


def _operators() -> Any:
    return torch.ops


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def flash_attention(context: Context) -> Outcome:
    """Two sequences packed, causal, grouped heads; version 3 on Hopper, else 2."""
    if not context.on_gpu:
        return skipped(NO_GPU)
    if importlib.util.find_spec("vllm") is None:
        return skipped("vLLM is not installed")
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version = 3 if torch.cuda.get_device_capability()[0] == 9 else 2
    lengths, heads, kv_heads, size = (70, 130), 8, 2, 64
    shape = (sum(lengths), heads, size)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(sum(lengths), kv_heads, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bounds = torch.tensor([0, lengths[0], sum(lengths)], device="cuda", dtype=torch.int32)
    got: Any = flash_attn_varlen_func(
        q, k, v, max(lengths), bounds, max(lengths), bounds, causal=True, softmax_scale=size**-0.5, fa_version=version
    )
    want, begin = torch.empty(shape, device="cuda"), 0
    for length in lengths:
        rows = slice(begin, begin + length)
        query, key, value = (x[rows].float().transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(heads // kv_heads, 0) for x in (key, value))
        got_rows = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        want[rows] = got_rows.transpose(0, 1)
        begin += length
    outcome = Outcome()
    outcome.numbers["version"] = version
    outcome.near("largest error", _largest(got.float() - want), 0.0, _TOLERANCE)
    return outcome


def transformer_engine(context: Context) -> Outcome:
    """Forward and backward of its linear layer."""
    if not context.on_gpu:
        return skipped(NO_GPU)
    if importlib.util.find_spec("transformer_engine") is None:
        return skipped("Transformer Engine is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    layer = te.Linear(256, 128, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    out.float().square().sum().backward()
    leaf = x.detach().float().requires_grad_()
    want = torch.nn.functional.linear(leaf, layer.weight.float(), layer.bias.float())
    want.square().sum().backward()
    outcome = Outcome()
    outcome.near("forward, largest error", _largest(out.float() - want), 0.0, _TOLERANCE)
    assert x.grad is not None
    assert leaf.grad is not None
    norm = float(leaf.grad.norm())
    outcome.near("gradient, relative error", float((x.grad.float() - leaf.grad).norm()) / norm, 0.0, _TOLERANCE)
    outcome.numbers["chosen for a rank"] = device.has_transformer_engine()
    return outcome
