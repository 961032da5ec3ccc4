"""What a forward-backward pass measures of its tokens, by the metric's name, over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from stare_megatron.algo.losses.types import Reported
from stare_megatron.trainer.model_runner import Runner
from stare_megatron.types import Measured


class Tally:
    """Totals, weights and largest values of a pass on this rank, float64: exact counts up to 2^53.

    Ranks exchange them in the order of their names. Every micro-batch, also one without tokens, brings all names, and
    every rank of the last pipeline stage has a micro-batch: so all of them know the same names.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kinds: dict[str, str] = {}
        self._totals: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, reports: Mapping[str, Reported]) -> None:
        """What was measured of a micro-batch.

        Raises:
            ValueError: other names, or another kind of one, than at the micro-batch before.
        """
        kinds = {name: report.kind for name, report in reports.items()}
        if self._kinds and kinds != self._kinds:
            changed = sorted(name for name, _ in kinds.items() ^ self._kinds.items())
            raise ValueError(f"a loss reports the same metrics for every micro-batch; it changed {', '.join(changed)}")
        self._kinds = kinds
        for name, report in reports.items():
            x = report.x.detach().double()
            if report.kind == "max":
                before = self._totals.get(name, x.new_full((), -math.inf))
                self._totals[name] = torch.maximum(before, x.amax()) if x.numel() else before
            else:
                self._totals[name] = self._totals.get(name, 0.0) + x.sum()
            self._tokens[name] = self._tokens.get(name, 0) + x.numel()

    def measured(self, runner: Runner) -> tuple[Measured, ...]:
        """Over all ranks, and on all of them. A collective."""
        return runner.object_from_last_stage(self._over_ranks(runner) if runner.is_last_stage else ())

    def _over_ranks(self, runner: Runner) -> tuple[Measured, ...]:
        summed, largest = ([n for n in sorted(self._kinds) if (self._kinds[n] == "max") is c] for c in (False, True))
        counts = torch.tensor([self._tokens[n] for n in summed], dtype=torch.float64, device=self._device)
        sums = runner.comm.sum(torch.cat([torch.stack([self._totals[n] for n in summed]), counts])).tolist()
        maxima = runner.comm.max(torch.stack([self._totals[n] for n in largest])).tolist() if largest else []
        found = [
            Measured(
                name,
                int(total) if self._kinds[name] == "count" else total,
                int(count) if self._kinds[name] == "mean" else 1,
            )
            for name, total, count in zip(summed, sums[: len(summed)], sums[len(summed) :], strict=True)
        ]
        return (*found, *(Measured(name, value) for name, value in zip(largest, maxima, strict=True)))
