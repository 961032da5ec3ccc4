"""STARE (arXiv 2606.19236, the reweighted objective): GRPO's per-token loss times the token weight of `algo.stare`.

loss = w * correction * l        w = 1 everywhere while the gate is closed, which is GRPO
"""

from __future__ import annotations

import dataclasses

from stare_megatron.algo import controller, stare
from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.comm import Comm
from stare_megatron.algo.losses.grpo import grpo_loss
from stare_megatron.algo.losses.types import LossInputs, TokenLoss
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import Control


def stare_loss(tokens: LossInputs, config: AlgorithmConfig) -> TokenLoss:
    plain = grpo_loss(tokens, config)
    return dataclasses.replace(plain, loss_T=plain.loss_T * tokens.weight_T)


def _weigh(tokens: stare.Candidates, control: Control, config: AlgorithmConfig, comm: Comm) -> stare.Weights:
    return stare.weigh(tokens, control, config.stare, comm)


def _foresees(config: AlgorithmConfig) -> bool:
    return config.stare.weight == "auto"


ALGORITHM = Algorithm(stare_loss, controller=controller.observe, weigh=_weigh, foresees=_foresees)
