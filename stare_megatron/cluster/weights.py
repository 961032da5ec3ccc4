"""How the trainer's rank 0 reaches the engines during a weight push: Ray calls behind `sync.fanout.EngineFanOut`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stare_megatron.cluster import runtime
from stare_megatron.sync.fanout import EngineFanOut


def ray_fan_out(engines: list[Any], workers: int) -> EngineFanOut:
    """Calls to engine actors, all at once.

    Args:
        engines: actor handles.
        workers: vLLM workers of each engine.
    """
    names = [f"engine {i}" for i in range(len(engines))]

    def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        refs = [engine.call.remote(method, *args) for engine, args in zip(engines, arguments, strict=True)]
        runtime.wait(refs, names)

    return EngineFanOut([workers] * len(engines), call)
