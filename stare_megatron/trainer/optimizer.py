"""Megatron-Core's optimizer with the run's settings.

The order within a step: `zero_grad`, the forward-backward schedule (which reduces the gradients, see
`model.PolicyConfig` for the convention), `step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import megatron.core.optimizer as upstream
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.utils import get_model_config

from stare_megatron.config import OptimizerConfig, TrainerConfig
from stare_megatron.config.upstream import check_precision_aware
from stare_megatron.errors import RunError
from stare_megatron.trainer import precise
from stare_megatron.trainer.spec import providers
from stare_megatron.types import Measured

if TYPE_CHECKING:
    from stare_megatron.trainer.model import PolicyConfig


@dataclass(frozen=True)
class Stepped:
    """What an optimizer step did, equal on every rank. `grad_norm`: before clipping, over the whole model; not finite:
    the parameters are spoilt, and the caller should stop the run; None: the gradients overflowed float16, and no
    parameter was changed. `loss_scale`: that the gradients were made with."""

    grad_norm: float | None
    loss_scale: float


def build_optimizer(chunks: Sequence[DistributedDataParallel], trainer: TrainerConfig) -> MegatronOptimizer:
    """AdamW over float32 master weights, its state split over data-parallel ranks if so configured. A collective.

    Biases and norm weights are not decayed. The weights must be loaded before: the master weights are copies.
    In float16 the loss is scaled by a factor that overflows halve and their absence doubles (Micikevicius et al.,
    arXiv 1710.03740).

    Raises:
        UserError: `precision_aware` without Transformer Engine's Adam.
        RuntimeError: Megatron-Core found another Adam than `spec.providers` announced.
    """
    # Upstream chooses by what can be imported, `providers` by the device; the patch's AdamW runs torch's kernels.
    origin = upstream.Adam.__module__.partition(".")[0]
    if origin.replace("stare_megatron_patches", "torch") != providers().adam:
        raise RuntimeError(f"Adam comes from {upstream.Adam.__module__}, {providers().adam} was announced")
    check_precision_aware(trainer, providers().adam == "transformer_engine")
    settings = trainer.optimizer
    config: PolicyConfig = get_model_config(chunks[0])
    optimizer = get_megatron_optimizer(
        upstream.OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=config.bf16,
            fp16=config.fp16,
            initial_loss_scale=settings.initial_loss_scale,
            loss_scale_window=settings.loss_scale_window,
            # Every skipped step costs the rollouts of a batch: one overflow is enough to lower the scale.
            hysteresis=1,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=trainer.distributed_optimizer,
            **precise.settings(settings),
        ),
        list(chunks),
        use_gloo_process_groups=False,
    )
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def zero_grad(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Clear the gradient buffers; before each forward-backward."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def step(optimizer: MegatronOptimizer, settings: OptimizerConfig, lr: float) -> Stepped:
    """Clip and apply the gradients at learning rate `lr`. A collective.

    Raises:
        RunError: the gradients overflow float16 although the loss is scaled by 1 only. No parameter was changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    scale = float(optimizer.get_loss_scale())
    done: Any = optimizer.step()
    _, grad_norm, _ = done
    if grad_norm is None and scale <= 1.0:
        raise RunError("the gradients overflow float16 at a loss scale of 1; train in model.dtype = 'bfloat16'")
    return Stepped(None if grad_norm is None else float(grad_norm), scale)


def report(done: Stepped, lr: float, *, scaled: bool) -> list[Measured]:
    """What to log of a step at learning rate `lr`. `scaled`: the loss was, for float16."""
    found = [Measured("update/lr", lr)]
    if done.grad_norm is not None:
        found.append(Measured("update/grad_norm", done.grad_norm))
    if scaled:
        found.append(Measured("update/loss_scale", done.loss_scale))
        found.append(Measured("update/overflows", done.grad_norm is None))
    return found
