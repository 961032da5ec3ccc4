"""Rotary frequencies of models with a longer context than they were first trained on.

Upstream's own (`RotaryEmbedding(rope_scaling=True)`) takes Llama 3's factor only, with 3.1's other constants fixed.
"""

from __future__ import annotations

import math

import torch

from stare_megatron.models.rotary import Linear, Llama3, RopeScaling, Yarn


def scaled(inv_freq: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """Scale `inv_freq` float32 [head_dim / 2], radians per position, of base `theta`."""
    match scaling:
        case Linear():
            return inv_freq / scaling.factor
        case Llama3():
            return _llama3(inv_freq, scaling)
        case Yarn():
            return _yarn(inv_freq, theta, scaling)


def _llama3(inv_freq: torch.Tensor, scaling: Llama3) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated (transformers,
    modeling_rope_utils.py, `_compute_llama3_parameters`)."""
    wavelength = 2 * math.pi / inv_freq
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    stretched = torch.where(wavelength > low, inv_freq / scaling.factor, inv_freq)
    return torch.where((wavelength <= low) & (wavelength >= high), between, stretched)


def _yarn(inv_freq: torch.Tensor, theta: float, scaling: Yarn) -> torch.Tensor:
    """arXiv 2309.00071, section 3.2, with the bounds in dimensions as transformers has them (modeling_rope_utils.py,
    `_compute_yarn_parameters`)."""
    half = len(inv_freq)

    def dimension(turns: float) -> float:
        """The dimension, of `half`, whose wave turns so often in the original context."""
        return half * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # Upstream's upper bound is in dimensions of the head, two a wave.
    first, last = max(first, 0), min(last, 2 * half - 1)
    if first == last:
        last += 0.001
    stretched = ((torch.arange(half, dtype=torch.float32, device=inv_freq.device) - first) / (last - first)).clamp(0, 1)
    return inv_freq / scaling.factor * stretched + inv_freq * (1 - stretched)
