"""What a forward-backward pass sums up of its loss, over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stare_megatron.algo.correction import Correction
from stare_megatron.algo.selection import NEGATIVE, POSITIVE
from stare_megatron.algo.stare import Weights
from stare_megatron.trainer.model_runner import Runner


@dataclass(frozen=True)
class LossStats:
    """What an optimizer step's forward-backward saw, over all ranks; see `types.UpdateStats`."""

    loss: float
    clip_fraction: float
    ratio_max: float
    kl: float
    selected_pos: int
    selected_neg: int
    num_pos: int
    num_neg: int
    correction_mean: float
    correction_bounded: float


class Tally:
    """Sums of a pass on this rank: float64 [5] (loss, clipped, kl, correction, bounded by it), largest ratio, counts
    int64 [4]."""

    def __init__(self, place: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=place)
        self.ratio_max = torch.zeros(1, dtype=torch.float64, device=place)
        self.counts = torch.zeros(4, dtype=torch.float64, device=place)  # exact up to 2^53

    def add(self, loss: torch.Tensor, clipped_T: torch.Tensor, kl_T: torch.Tensor, ratio_T: torch.Tensor) -> None:
        self.sums[:3] += torch.stack([loss.detach().double(), clipped_T.sum().double(), kl_T.double().sum()])
        if ratio_T.numel():
            self.ratio_max = torch.maximum(self.ratio_max, ratio_T.double().amax(0, keepdim=True))

    def correct(self, correction: Correction) -> None:
        self.sums[3:] += torch.stack([correction.factor_T.double().sum(), correction.bounded_T.sum().double()])

    def count(self, weights: Weights, selected_T: torch.Tensor) -> None:
        subsets = [weights.subset_T == code for code in (POSITIVE, NEGATIVE)]
        self.counts += torch.stack([(s & selected_T).sum() for s in subsets] + [s.sum() for s in subsets]).double()

    def total(self, runner: Runner, num_action_tokens: int) -> LossStats:
        if runner.is_last_stage:
            runner.comm.sum(self.sums)
            runner.comm.sum(self.counts)
            runner.comm.max(self.ratio_max)
        everything = runner.from_last_stage(torch.cat([self.sums, self.ratio_max, self.counts])).tolist()
        loss, ratio_max, chosen = everything[0], everything[5], [int(n) for n in everything[6:]]
        clipped, kl, correction, bounded = (x / num_action_tokens for x in everything[1:5])
        return LossStats(loss, clipped, ratio_max, kl, *chosen, correction, bounded)  # pyright: ignore[reportCallIssue]
