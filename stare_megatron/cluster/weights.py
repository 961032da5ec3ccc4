"""The control side of a weight push: vLLM's `VLLMWeightSyncClient`, spoken to every engine actor by Ray."""

from __future__ import annotations

from typing import Any

import ray


class RayWeightSyncClient:
    """Fans each call out to all engines and waits for all.

    `init_weight_transfer_engine` gives each engine its own `rank_offset`: engine i's workers follow those of the
    engines before it in the transfer group, whose rank 0 is the trainer.
    """

    def __init__(self, engines: list[Any], tensor_parallel: int) -> None:
        self._engines = engines
        self._tensor_parallel = tensor_parallel

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self._engines]
        for i, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] += i * self._tensor_parallel
        calls = zip(self._engines, infos, strict=True)
        ray.get([engine.init_weight_transfer_engine.remote(info) for engine, info in calls])

    def start_weight_update(self) -> None:
        ray.get([engine.start_weight_update.remote() for engine in self._engines])

    def update_weights(self, update_info: Any) -> None:
        ray.get([engine.update_weights.remote(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        ray.get([engine.finish_weight_update.remote(weight_version) for engine in self._engines])
