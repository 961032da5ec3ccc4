"""The learning rate as a function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from stare_megatron.config import OptimizerConfig


def learning_rate(settings: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`: linear warm-up, then constant, cosine or
    linear decay to `min_lr` at the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return settings.lr
    decay_steps = max(1, total_steps - 1 - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / decay_steps)
    left = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.min_lr + (settings.lr - settings.min_lr) * left
