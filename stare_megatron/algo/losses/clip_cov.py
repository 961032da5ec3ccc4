"""Clip-Cov (arXiv 2505.22617, equations 10 to 12): a few tokens of high covariance get no gradient.

loss = correction * max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)),  but 0 for max(1, floor(fraction N)) of the tokens
with low < cov < high, drawn without regard to their covariance; cov: `algo.covariance`, N: action tokens of the batch

Means, N and the draw are of the whole update batch, once, from the scoring pass. (The reference draws for each
micro-batch under the current policy, among the tokens that the clip has spared.) The draw is by a hash of the token's
place in the batch, so it is the same for every layout.
"""

from __future__ import annotations

import torch

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.comm import Comm
from stare_megatron.algo.covariance import share_of, token_covariance
from stare_megatron.algo.losses.types import LossInputs, Reported, TokenLoss
from stare_megatron.algo.selection import NEITHER, POSITIVE, select_some, subset_codes
from stare_megatron.algo.stare import Candidates, Weights
from stare_megatron.algo.surrogate import importance_ratio
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import Control


def clip_cov_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    ratio_T = importance_ratio(tokens.logprob_T, tokens.old_logprob_T)
    plain_T = -tokens.advantage_T * ratio_T
    bounded_T = -tokens.advantage_T * ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    clipped_T = (bounded_T > plain_T).detach()
    detached_T = tokens.selected_T & ~clipped_T  # a clipped token has no gradient to take; its value stays
    loss_T = torch.where(detached_T, 0.0, torch.maximum(plain_T, bounded_T)) * tokens.correction_T
    return TokenLoss(loss_T, ratio_T.detach(), clipped_T | detached_T, {"loss/detached": Reported(detached_T)})


def _weigh(tokens: Candidates, control: Control, config: AlgorithmConfig, comm: Comm) -> Weights:
    settings = config.clip_cov
    covariance_T, num_actions = token_covariance(tokens, comm)
    between_T = tokens.action_T & (covariance_T > settings.low) & (covariance_T < settings.high)
    code_T = torch.where(between_T, POSITIVE, NEITHER)
    budget = share_of(settings.fraction, num_actions)
    # Equal values leave the choice to the hash of the token's id.
    chosen = select_some(
        torch.zeros_like(tokens.surprisal_T), code_T, tokens.global_id_T, lambda n_S: n_S.clamp(max=budget), comm
    )
    return Weights(torch.ones_like(tokens.advantage_T), subset_codes(tokens.advantage_T, tokens.action_T), chosen)


ALGORITHM = Algorithm(clip_cov_loss, weigh=_weigh)
