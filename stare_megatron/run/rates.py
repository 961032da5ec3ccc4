"""How fast each phase of a step works the devices: model operations by time, and by what the devices could do.

Operations are those that the model needs (2 for each weight that a token meets, and causal attention), whatever is
computed again, padded or thrown away: "model FLOPs" as in PaLM (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stare_megatron.config import Config
from stare_megatron.types import GroupSummary, Measured, SequenceCost

_TERA = 1e12
_TRAINING = 3  # operations of a forward and a backward pass, by those of the forward pass


@dataclass(frozen=True)
class Rates:
    """What a run's devices do. `ranks`, `workers` of all engines: one device each; `devices`: all of them; `peak`:
    FLOP/s of one, NaN if it is not known; `scores`: the ranks make a scoring pass."""

    cost: SequenceCost
    ranks: int
    workers: int
    devices: int
    peak: float
    scores: bool

    def of_phases(
        self, sampled: Sequence[GroupSummary], kept: Sequence[GroupSummary], seconds: Mapping[str, float]
    ) -> tuple[Measured, ...]:
        """Of a step that sampled and kept these groups, and took so long for its phases; `rollout`: for sampling, also
        beside other phases."""
        forward = sum(self.cost(n) for group in kept for n in _trained(group))
        work = {
            "rollout": (sum(_sampling(group, self.cost) for group in sampled), self.workers),
            "score": (forward * self.scores, self.ranks),
            "update": (forward * _TRAINING, self.ranks),
        }
        found = []
        for phase, (operations, count) in work.items():
            time = seconds.get(phase, 0.0) * count
            found.append(Measured(f"rates/{phase}_tflops", operations / _TERA, time))
            found.append(Measured(f"rates/{phase}_mfu", operations, time * self.peak))
        return tuple(found)

    def of_step(self, tokens_sampled: int, seconds: float) -> Measured:
        return Measured("throughput/tokens_per_second_per_device", tokens_sampled, seconds * self.devices)


def rates_of(config: Config, cost: SequenceCost, peak: float) -> Rates:
    """For the devices that a configuration takes. Colocated engines have theirs from the ranks."""
    ranks, workers = config.trainer.world_size, config.inference.engines * config.inference.tensor_parallel
    shared = config.inference.placement == "colocated"
    devices = max(ranks, workers) if shared else ranks + workers
    return Rates(cost, ranks, workers, devices, peak, scores=config.trainer.scoring == "trainer")


def _trained(group: GroupSummary) -> list[int]:
    sizes = zip(group.statuses, group.num_tokens, group.num_action_tokens, strict=True)
    return [tokens for status, tokens, actions in sizes if status.is_trainable and actions]


def _sampling(group: GroupSummary, cost: SequenceCost) -> float:
    """The group's prompt once, for its samples share what was computed of it, and the rest of each sample."""
    seen = [e.observation_tokens for e in group.episodes] or [0] * len(group.num_tokens)
    prompt = min(n - a - o for n, a, o in zip(group.num_tokens, group.num_action_tokens, seen, strict=True))
    return cost(prompt) + sum(cost(n) - cost(prompt) for n in group.num_tokens)
