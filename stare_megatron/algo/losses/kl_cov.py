"""KL-Cov (arXiv 2505.22617, equations 10, 13 and 14): a penalty on the few tokens of highest covariance; no clip.

loss = correction * (-A r + coefficient |logp - old_logp| on the max(1, floor(fraction N)) tokens of largest covariance)

Means, N and the tokens are of the whole update batch, once, from the scoring pass, where the reference ranks each
micro-batch under the current policy. The first step after scoring has logp = old_logp, where |x| has gradient 0: with
`trainer.updates_per_batch = 1` the penalty does nothing.
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


def kl_cov_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    ratio_T = importance_ratio(tokens.logprob_T, tokens.old_logprob_T)
    penalty_T = config.kl_cov.coefficient * (tokens.logprob_T - tokens.old_logprob_T).abs()
    loss_T = -tokens.advantage_T * ratio_T + torch.where(tokens.selected_T, penalty_T, 0.0)
    found = {"loss/penalty": Reported(penalty_T[tokens.selected_T])}
    return TokenLoss(loss_T * tokens.correction_T, ratio_T.detach(), torch.zeros_like(tokens.selected_T), found)


def _weigh(tokens: Candidates, control: Control, config: AlgorithmConfig, comm: Comm) -> Weights:
    covariance_T, num_actions = token_covariance(tokens, comm)
    budget = share_of(config.kl_cov.fraction, num_actions)
    everything_T = torch.where(tokens.action_T, POSITIVE, NEITHER)
    chosen = select_some(covariance_T, everything_T, tokens.global_id_T, lambda n_S: n_S.clamp(max=budget), comm)
    return Weights(torch.ones_like(tokens.advantage_T), subset_codes(tokens.advantage_T, tokens.action_T), chosen)


ALGORITHM = Algorithm(kl_cov_loss, weigh=_weigh)
