"""The 80/20 rule (arXiv 2506.01939): only the tokens of highest entropy learn.

loss = GRPO's on the ceil(fraction N) action tokens of highest entropy in the batch, 0 on the others; the denominators
still count all N action tokens

The batch is the whole update batch over all ranks, the entropy that of the scoring pass.
"""

from __future__ import annotations

import torch

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.losses.stare import stare_loss
from stare_megatron.algo.selection import NEITHER, POSITIVE, select_top, subset_codes
from stare_megatron.algo.shards import Shards
from stare_megatron.algo.stare import Candidates, Weights
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import Control


def _weigh(tokens: Candidates, control: Control, config: AlgorithmConfig, shards: Shards) -> Weights:
    everything_T = torch.where(tokens.action_T, POSITIVE, NEITHER)
    fraction = config.high_entropy_tokens.fraction
    chosen = select_top(tokens.entropy_T, everything_T, tokens.global_id_T, fraction, shards)
    weight_T = chosen.selected_T.to(tokens.advantage_T.dtype)
    return Weights(weight_T, subset_codes(tokens.advantage_T, tokens.action_T), chosen)


ALGORITHM = Algorithm(stare_loss, weigh=_weigh)
