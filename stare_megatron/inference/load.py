"""How full vLLM's scheduler is, from what its core tells with every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stare_megatron.types.report import EngineLoad

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs

_PREEMPTED = 3  # vllm.v1.engine.EngineCoreEventType


class LoadMeter:
    """Sums steps up until they are taken."""

    def __init__(self) -> None:
        self._clear()

    def record(self, made: EngineCoreOutputs) -> None:
        """What one step made."""
        for output in made.outputs:
            if output.events:
                self._preemptions += sum(event.type == _PREEMPTED for event in output.events)
        stats = made.scheduler_stats
        if stats is not None and stats.num_running_reqs:
            self._iterations += 1
            self._requests += stats.num_running_reqs
            self._kv_use += stats.kv_cache_usage
            self._kv_use_max = max(self._kv_use_max, stats.kv_cache_usage)
        if stats is not None and (drafts := stats.spec_decoding_stats) is not None:
            self._drafts += drafts.num_drafts
            self._drafted += drafts.num_draft_tokens
            self._accepted += drafts.num_accepted_tokens

    def take(self) -> EngineLoad:
        """What was recorded since it was last taken."""
        load = EngineLoad(
            self._iterations,
            self._requests,
            self._kv_use,
            self._kv_use_max,
            self._preemptions,
            self._drafts,
            self._drafted,
            self._accepted,
        )
        self._clear()
        return load

    def _clear(self) -> None:
        self._iterations = self._requests = self._preemptions = 0
        self._drafts = self._drafted = self._accepted = 0
        self._kv_use = self._kv_use_max = 0.0
