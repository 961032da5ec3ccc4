"""What trainer ranks are given, and the held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.cluster import runtime
from stare_megatron.cluster.supervised import SupervisedGroup
from stare_megatron.config import SftConfig
from stare_megatron.data.supervised import SequenceSet
from stare_megatron.errors import GivenUpError
from stare_megatron.metrics import eval_records
from stare_megatron.metrics.catalogue import Metric
from stare_megatron.metrics.reduce import reduce
from stare_megatron.types import GroupSummary

_MICRO_BATCHES = 8  # of each rank, in a batch of held-out sequences


@dataclass(frozen=True)
class Batch:
    """Sequences to learn or to measure, by reference, with their numbers."""

    groups: Sequence[tuple[runtime.Ref, GroupSummary]]

    @property
    def tokens(self) -> int:
        """Of all sequences, learned or not."""
        return sum(sum(summary.num_tokens) for _, summary in self.groups)


def batch_of(sequences: SequenceSet, chosen: Sequence[int]) -> Batch:
    """Sequences by their index, handed to Ray."""
    groups = [sequences.group(i) for i in chosen]
    return Batch([(runtime.put(group), group.summary()) for group in groups])


class HeldOut:
    """The loss of held-out sequences, measured when due and written to `eval.jsonl`.

    Args:
        sequences: None: there are none.
        show: metrics and lines of a measurement, for displays.
        restored: steps done before this start; measurements beyond are cut.
    """

    def __init__(
        self,
        config: SftConfig,
        steps: int,
        sequences: SequenceSet | None,
        show: Callable[[int, Sequence[Metric], Sequence[str]], None],
        folder: Path,
        restored: int,
    ) -> None:
        self._every, self._steps = config.sft.eval_every, steps
        self._budget = config.trainer.micro_batch_tokens * config.trainer.data_parallel * _MICRO_BATCHES
        self._sequences = sequences
        self._show = show
        self._folder = folder
        self._done = set(eval_records.restore(folder, restored, ""))

    def due(self, step: int, *, epoch_is_over: bool) -> bool:
        """Before the first step, after the last, and as `sft.eval_every` says."""
        if self._sequences is None or step in self._done:
            return False
        regular = step % self._every == 0 if self._every else epoch_is_over
        return regular or step in (0, self._steps)

    def measure(self, trainers: SupervisedGroup, step: int, stop: Callable[[], bool]) -> float:
        """The mean over all learned tokens, nats. `stop`: whether an end is wanted, asked before each batch.

        Raises:
            RunError: a log-prob is not finite. GivenUpError: an end is wanted; nothing is on record.
        """
        assert self._sequences is not None
        parts = []
        for chosen in self._batches(self._sequences):
            if stop():
                raise GivenUpError("given up (held-out loss)")
            parts.append(trainers.held_out(batch_of(self._sequences, chosen)))
        metrics = reduce(parts)
        loss = metrics[0].value
        eval_records.append(self._folder, step, metrics)
        self._done.add(step)
        self._show(step, metrics, [f"held-out loss {loss:.4f} nats/token, {sum(p.weight for p in parts):,} tokens"])
        return loss

    def _batches(self, sequences: SequenceSet) -> Iterator[list[int]]:
        chosen: list[int] = []
        tokens = 0
        for i, length in enumerate(sequences.lengths.tolist()):
            if chosen and tokens + length > self._budget:
                yield chosen
                chosen, tokens = [], 0
            chosen.append(i)
            tokens += length
        yield chosen
