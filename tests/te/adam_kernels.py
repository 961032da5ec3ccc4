"""The kernels that Transformer Engine's Adam and Megatron-Core's clipping call, in torch: what
transformer_engine/common/multi_tensor/*.cu compute, element by element in float32."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch


def install() -> None:
    """Into the stand-in for the extension, and where Transformer Engine has taken names from it, before Megatron-Core
    does."""
    import transformer_engine.pytorch.optimizers as optimizers

    kernels = {
        "multi_tensor_adam": adam,
        "multi_tensor_adam_param_remainder": adam_remainder,
        "multi_tensor_l2norm": l2norm,
        "multi_tensor_scale": scale,
        "multi_tensor_scale_tensor": scale,
    }
    for module in (sys.modules["transformer_engine_torch"], optimizers):
        vars(module).update(kernels)


def _update(g: Any, p: Any, m: Any, v: Any, hyper: Sequence[Any]) -> tuple[Any, Any, Any]:
    """AdamW. `hyper`: rate, betas, epsilon, step, 1 for decoupled decay, 1 for bias correction, decay."""
    lr, beta1, beta2, eps, step, decoupled, corrected, decay = hyper
    assert decoupled == corrected == 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    change = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p
    return p - lr * change, m, v


def adam(_: int, __: Any, lists: Sequence[Sequence[torch.Tensor]], *hyper: Any) -> None:
    """`lists`: gradients, parameters, both moments, and master weights where there are some."""
    for g, p, m, v, *master in zip(*lists, strict=True):
        full = master[0] if master else p
        new, first, second = _update(g.float(), full.float(), m.float(), v.float(), hyper)
        for tensor, value in ((full, new), (p, new), (m, first), (v, second)):
            tensor.copy_(value)


def adam_remainder(_: int, __: Any, lists: Sequence[Sequence[torch.Tensor]], *hyper: Any) -> None:
    """`lists`: gradients, bfloat16 parameters, both moments, and the int16 beside each parameter."""
    for g, p, m, v, rest in zip(*lists, strict=True):
        halves = torch.empty(p.numel(), 2, dtype=torch.int16)
        halves[:, 0] = rest
        halves[:, 1] = p.view(torch.int16) - (rest < 0).to(torch.int16)
        new, first, second = _update(g.float(), halves.view(torch.float32)[:, 0], m.float(), v.float(), hyper)
        lower, upper = new.contiguous().view(torch.int16).view(-1, 2).unbind(1)
        rest.copy_(lower)
        p.view(torch.int16).copy_(upper + (lower < 0).to(torch.int16))
        m.copy_(first)
        v.copy_(second)


def l2norm(_: int, __: Any, lists: Sequence[Sequence[torch.Tensor]], *___: Any) -> tuple[torch.Tensor, None]:
    return torch.stack([t.float().norm() for t in lists[0]]).norm().view(1), None


def scale(_: int, __: Any, lists: Sequence[Sequence[torch.Tensor]], factor: Any) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * factor)
