"""The driver's handle on trainer ranks that learn sequences as they are."""

from __future__ import annotations

from stare_megatron.cluster.trainers import TrainerGroup
from stare_megatron.cluster.update_batch import UpdateBatch
from stare_megatron.types import Measured, UpdateStats


class SupervisedGroup(TrainerGroup):
    """All trainer ranks, without engines. A batch's groups are those of `SequenceSet.group`."""

    def fit(self, batch: UpdateBatch) -> UpdateStats:
        """One optimizer step.

        Raises:
            RunError: a loss or gradient norm is not finite.
        """
        self.load(batch)
        return self._rank("fit")[0]

    def held_out(self, batch: UpdateBatch) -> Measured:
        """Sum of the cross entropy over the batch's marked tokens, and how many they are; changes nothing.

        Raises:
            RunError: a log-prob is not finite.
        """
        self.load(batch)
        return self._rank("held_out")[0]
