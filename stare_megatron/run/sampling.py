"""Where update batches come from."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from stare_megatron.data.prompts import PromptStream, StreamState
from stare_megatron.rollout.collect import Collected, Collector

Ref = TypeVar("Ref")
Batch_co = TypeVar("Batch_co", covariant=True)


class Sampler(Protocol[Batch_co]):
    """Samples the update batches of a run."""

    def next_batch(self, version: int) -> Batch_co:
        """Groups with rewards, sampled by the policy of `version`, which the engines hold.

        Raises:
            RunError: an engine failed.
        """
        ...

    def state(self) -> StreamState:
        """Where the prompts stand, for a checkpoint."""
        ...


class SynchronousSampler(Generic[Ref]):
    """A batch is sampled whole while the trainer waits, every token by the newest policy."""

    def __init__(self, collector: Collector[Ref], stream: PromptStream) -> None:
        self._collector = collector
        self._stream = stream

    def next_batch(self, version: int) -> Collected[Ref]:
        return self._collector.collect(version)

    def state(self) -> StreamState:
        return self._stream.state()
