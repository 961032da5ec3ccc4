"""How full vLLM's scheduler is, from the statistics it hands out with every iteration."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from stare_megatron.types.report import EngineLoad


class LoadMeter(StatLoggerBase):
    """Sums iterations up until they are taken."""

    def __init__(self) -> None:
        self._clear()

    def made_for(self, vllm_config: VllmConfig, engine_index: int = 0) -> LoadMeter:
        """vLLM makes its loggers itself; it gets this one."""
        return self

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if iteration_stats is not None:
            self._preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is not None and scheduler_stats.num_running_reqs:
            self._iterations += 1
            self._requests += scheduler_stats.num_running_reqs
            self._kv_use += scheduler_stats.kv_cache_usage
            self._kv_use_max = max(self._kv_use_max, scheduler_stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def take(self) -> EngineLoad:
        """What was recorded since it was last taken."""
        load = EngineLoad(self._iterations, self._requests, self._kv_use, self._kv_use_max, self._preemptions)
        self._clear()
        return load

    def _clear(self) -> None:
        self._iterations = self._requests = self._preemptions = 0
        self._kv_use = self._kv_use_max = 0.0
