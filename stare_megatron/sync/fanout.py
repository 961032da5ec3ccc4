"""One VLLMWeightSyncClient for several engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[str, Sequence[tuple[Any, ...]]], None]
"""`call(method, arguments)`: run `method(*arguments[i])` on engine i, on all engines at once; return when all have
returned, raise if one raised."""


def rank_offsets(init_info: dict[str, Any], workers: Sequence[int]) -> list[dict[str, Any]]:
    """The handshake of each engine.

    vLLM's trainer engines build one worker-side init info whose `rank_offset` is that of the first worker (1, after
    the sender). Every worker adds its rank within its engine, so engine i's offset must grow by the workers of the
    engines before it. Backends without a group (ipc) have no `rank_offset` and get the same info.

    Args:
        init_info: what the trainer engine passes to `init_weight_transfer_engine`.
        workers: workers (TP x PP) of each engine.
    """
    if "rank_offset" not in init_info:
        return [dict(init_info) for _ in workers]
    before = [sum(workers[:i]) for i in range(len(workers))]
    return [init_info | {"rank_offset": init_info["rank_offset"] + n} for n in before]


class EngineFanOut:
    """vLLM's VLLMWeightSyncClient over several engines, whatever carries the calls.

    Args:
        workers: workers (TP x PP) of each engine.
        call: carries a call to all engines.
    """

    def __init__(self, workers: Sequence[int], call: Call) -> None:
        self.workers = tuple(workers)
        self._call = call

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", [(info,) for info in rank_offsets(init_info, self.workers)])

    def start_weight_update(self) -> None:
        self._call("start_weight_update", [() for _ in self.workers])

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._call("update_weights", [(update_info,) for _ in self.workers])

    def give_up_weight_update(self) -> None:
        """After an error; vLLM's client has no such method."""
        self._call("give_up_weight_update", [() for _ in self.workers])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if weight_version is None:
            raise ValueError("every push has a version")
        self._call("finish_weight_update", [(int(weight_version),) for _ in self.workers])
