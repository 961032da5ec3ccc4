"""RMSNorm for the local layer spec.

Upstream's `WrappedTorchNorm` refuses sequence parallelism: its weight lacks the mark by which the gradients of
parameters that see only a slice of the tokens are summed over the tensor-parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32.

    `hidden_size`: size of the last dimension. Further arguments of the spec interface are those of upstream's norms.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
