"""The 80/20 rule (arXiv 2506.01939, equation 6): only the tokens of highest entropy learn.

loss = mean of GRPO's over the k = ceil(fraction N) of the batch's N action tokens that have the highest entropy

The reduction divides by all tokens, so the weight of the k is N / k. The batch is the whole update batch over all
ranks, the entropy that of the scoring pass.
"""

from __future__ import annotations

import torch

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.comm import Comm
from stare_megatron.algo.losses.stare import stare_loss
from stare_megatron.algo.selection import NEITHER, POSITIVE, select_top, subset_codes
from stare_megatron.algo.stare import Candidates, Weights, require_scores
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import Control


def _weigh(tokens: Candidates, control: Control, config: AlgorithmConfig, comm: Comm) -> Weights:
    everything_T = torch.where(tokens.action_T, POSITIVE, NEITHER)
    fraction = config.high_entropy_tokens.fraction
    entropy_T = require_scores(tokens, "high_entropy_tokens").entropy_T
    chosen = select_top(entropy_T, everything_T, tokens.global_id_T, fraction, comm)
    share = chosen.count_S[POSITIVE] / chosen.selected_S[POSITIVE].clamp(min=1)
    weight_T = chosen.selected_T.to(tokens.advantage_T.dtype) * share.to(tokens.advantage_T.dtype)
    return Weights(weight_T, subset_codes(tokens.advantage_T, tokens.action_T), chosen)


ALGORITHM = Algorithm(stare_loss, weigh=_weigh)
