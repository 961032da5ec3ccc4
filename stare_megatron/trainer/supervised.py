"""Supervised training on a trainer rank: the cross entropy of marked tokens, through the same passes as an update."""

from __future__ import annotations

import torch

from stare_megatron.algo.losses.types import Reported
from stare_megatron.algo.reduce import fixed_point_sum, from_fixed_point
from stare_megatron.errors import RunError
from stare_megatron.trainer.model_runner import RankBatch, Runner
from stare_megatron.trainer.optimizer import zero_grad
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.trainer.scoring import score
from stare_megatron.trainer.sequence import MicroBatch
from stare_megatron.trainer.tally import Tally
from stare_megatron.types import Measured, UpdateStats


class SupervisedRank(TrainerRank):
    """A rank that also learns sequences as they are. After `load`: `fit` or `held_out`; the marked tokens are the
    actions of the trajectories that were loaded."""

    def fit(self) -> UpdateStats:
        """One optimizer step on what was loaded: minus the mean log-prob of all marked tokens of the step, over all
        ranks and micro-batches. What was loaded is dropped.

        Raises:
            RunError: as `update`.
        """
        (data,) = self._loaded
        with self._offload.present("parameters", "gradients"):
            zero_grad(self._chunks, self._optimizer)
            measured = cross_entropy(self._runner, data)
            loss = next(part for part in measured if part.name == "update/loss").value
            own = self._apply(data, loss)
        self._step, self._whole = self._step + 1, True
        self._loaded = []
        return UpdateStats((*measured, *own))

    def held_out(self) -> Measured:
        """The sum of minus log-prob over the marked tokens of what was loaded, and how many they are; the same bits for
        every layout. No graph, no step. What was loaded is dropped.

        Raises:
            RunError: a log-prob is not finite.
        """
        (data,) = self._loaded
        with self._offload.present("parameters"):
            logprob_T = score(self._runner, data, 1.0).scores.logprob_T[data.owned_T]
        self._loaded = []
        totals = torch.cat([fixed_point_sum(-logprob_T), data.owned_T.sum()[None]])
        if self._runner.is_last_stage:
            totals = self._runner.comm.sum(totals)
        total, broken, tokens = self._runner.from_last_stage(totals).tolist()
        if broken:
            raise RunError(f"held-out loss: of {tokens} tokens, {broken} have a log-prob that is not finite")
        return Measured("sft/held_out_loss", from_fixed_point(total), tokens)


def cross_entropy(runner: Runner, data: RankBatch) -> tuple[Measured, ...]:
    """Accumulate the gradient of the mean cross entropy in the chunks' buffers; returns what was measured. A
    collective."""
    tally = Tally(runner.place)

    def consume(hidden_RH: torch.Tensor, row: MicroBatch) -> torch.Tensor:
        kept_R = row.source_R >= 0
        logprob_R, entropy_R, _ = runner.head.log_probs(
            hidden_RH, row.target_R, temperature=1.0, entropy_gradient=False, sensitivity=False
        )
        loss = -(data.factor_T[row.source_R[kept_R]] * logprob_R[kept_R]).sum()
        tally.add({"update/loss": Reported(loss, "sum"), "policy/entropy": Reported(entropy_R[kept_R])})
        return loss

    runner.run(data.rows, consume, train=True)
    return tally.measured(runner)
