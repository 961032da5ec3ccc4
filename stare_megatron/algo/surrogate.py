"""The clipped surrogate, per token and unreduced.

PPO clip: arXiv 1707.06347, equation 7; asymmetric bounds ("clip-higher"): DAPO, arXiv 2503.14476, equation 8; dual
clip: arXiv 1912.09729, equation 5.
"""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0  # |log ratio| beyond this is clamped, so that exp stays finite


def importance_ratio(logprob_T: torch.Tensor, old_logprob_T: torch.Tensor) -> torch.Tensor:
    """exp(clamp(logprob - old, -20, 20)), [T]; differentiable in `logprob_T`."""
    return torch.exp((logprob_T - old_logprob_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def clipped_surrogate(
    ratio_T: torch.Tensor, advantage_T: torch.Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss per token [T] and where a bound took its gradient away, bool [T].

    l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); where A < 0, l = min(-A dual_clip, l).
    """
    plain_T = -advantage_T * ratio_T
    bounded_T = -advantage_T * ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_T = torch.maximum(plain_T, bounded_T)
    ceiling_T = -advantage_T * dual_clip
    over_T = (advantage_T < 0) & (ceiling_T < loss_T)
    clipped_T = (bounded_T > plain_T) | over_T
    return torch.where(advantage_T < 0, torch.minimum(ceiling_T, loss_T), loss_T), clipped_T.detach()


def kl_estimate(logprob_T: torch.Tensor, old_logprob_T: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r with r = exp(logprob - old), [T], >= 0: unbiased for KL(old || new) on samples of old (k3)."""
    log_ratio_T = (logprob_T - old_logprob_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio_T) - log_ratio_T
