"""How the trainer's ranks reach the engines during a weight push: Ray calls behind `sync.fanout.EngineFanOut`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stare_megatron.cluster import runtime
from stare_megatron.errors import EngineLostError, RunError
from stare_megatron.sync.fanout import EngineFanOut

if TYPE_CHECKING:
    from stare_megatron.sync.sharded import ShardedPusher
    from stare_megatron.trainer.rank import TrainerRank

Address = tuple[str, int]


def ray_fan_out(engines: Mapping[str, Any], workers: int) -> EngineFanOut:
    """Calls to engine actors, all at once.

    Args:
        engines: actor handles, by name.
        workers: vLLM workers of each engine.
    """

    crew = runtime.Crew(list(engines), lambda _: None, named_hosts=False, lost=EngineLostError)

    def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        refs = [engine.call.remote(method, *args) for engine, args in zip(engines.values(), arguments, strict=True)]
        crew.wait(refs, method)

    return EngineFanOut([workers] * len(engines), call)


class ShardedRank:
    """A rank's part in sharded pushes. `open` comes first on rank 0, whose address all ranks are then told."""

    def __init__(self, trainer: TrainerRank, rank: int, ranks: int) -> None:
        self._trainer = trainer
        self._rank = rank
        self._ranks = ranks
        self._store: Any = None
        self._pusher: ShardedPusher | None = None

    def open(self) -> Address:
        from stare_megatron.sync.wire import host_store

        host = runtime.node_address()
        self._store = host_store(host)
        return host, self._store.port

    def join(self, engines: Mapping[str, Any], workers: int, address: Address) -> list[str]:
        """Let engines, of `workers` workers each, take part from now on. Returns what to tell of it, on rank 0."""
        from stare_megatron.sync.sharded import ShardedPusher
        from stare_megatron.sync.source import ParamSpec
        from stare_megatron.sync.wire import join_store

        if self._pusher is None:
            specs = [ParamSpec(*meta) for meta in self._trainer.weight_metadata()]
            store = self._store or join_store(*address)
            with self._trainer.parameters_at_hand():
                self._pusher = ShardedPusher(
                    self._rank, self._ranks, specs, self._trainer.holdings, store, runtime.node_address()
                )
        return self._pusher.connect({name: ray_fan_out({name: actor}, workers) for name, actor in engines.items()})

    def push(self, version: int, engines: Collection[str] | None) -> int:
        """Returns the bytes that this rank sent."""
        with self._trainer.parameters_at_hand():
            return self._joined().push(version, engines)

    def sums(self, names: Collection[str]) -> dict[str, str]:
        """This rank's shares of the checksums of what it sends of the tensors `names`."""
        with self._trainer.parameters_at_hand():
            return self._joined().sums(names) if names else {}

    def _joined(self) -> ShardedPusher:
        """Raises: RunError: no engine has joined."""
        if self._pusher is None:
            raise RunError("weights cannot be pushed in shards before an engine has joined")
        return self._pusher
