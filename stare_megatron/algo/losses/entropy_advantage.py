"""Entropy-based advantage shaping (arXiv 2506.14758, equations 5 and 6): tokens of high entropy count for more.

A' = A + min(alpha H, |A| / kappa)        H: the token's entropy, without gradient; kappa > 1, so A keeps its sign
loss = GRPO's with A'

GRPO's token loss is homogeneous in a positive factor of A, so A' / A is a token weight: 1 + x for A > 0 and 1 - x for
A < 0, x = min(alpha H / |A|, 1 / kappa). H is the scoring pass's, where the reference takes the current one; with one
update a batch they are equal.
"""

from __future__ import annotations

import torch

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.comm import Comm
from stare_megatron.algo.losses.stare import stare_loss
from stare_megatron.algo.stare import Candidates, Weights, require_scores, weigh_equally
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import Control


def _weigh(tokens: Candidates, control: Control, config: AlgorithmConfig, comm: Comm) -> Weights:
    settings, plain = config.entropy_advantage, weigh_equally(tokens, comm)
    advantage_T = tokens.advantage_T
    size_T = torch.where(advantage_T == 0, 1.0, advantage_T.abs())
    entropy_T = require_scores(tokens, "entropy_advantage").entropy_T
    added_T = (settings.alpha * entropy_T / size_T).clamp(max=1.0 / settings.kappa)
    weight_T = torch.where(tokens.action_T, 1.0 + torch.sign(advantage_T) * added_T, 1.0)
    return Weights(weight_T.to(advantage_T.dtype), plain.subset_T, plain.selection)


ALGORITHM = Algorithm(stare_loss, weigh=_weigh)
