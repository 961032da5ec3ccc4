"""Llama 3's scaling of rotary frequencies.

Upstream's own (`RotaryEmbedding(rope_scaling=True)`) takes the factor only, with Llama 3.1's other constants fixed.
"""

from __future__ import annotations

import math

import torch

from stare_megatron.trainer.bridge.shape import RopeScaling


def llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Scale `inv_freq` float32 [head_dim / 2], radians per position: long waves are stretched by `factor`, short ones
    kept, those between interpolated (transformers, modeling_rope_utils.py, `_compute_llama3_parameters`)."""
    wavelength = 2 * math.pi / inv_freq
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    stretched = torch.where(wavelength > low, inv_freq / scaling.factor, inv_freq)
    return torch.where((wavelength <= low) & (wavelength >= high), between, stretched)
