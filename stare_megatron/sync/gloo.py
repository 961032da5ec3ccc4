"""vLLM weight-transfer backend `gloo`: CPU tensors from trainer rank 0 to every worker of every engine.

Modelled on vLLM's `nccl` backend (vllm/distributed/weight_transfer/nccl_engine.py): one group of the sender (rank 0)
and all workers, a handshake that carries the wire parameters, one `update_weights` a push, layerwise reload.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from stare_megatron.sync import wire
from stare_megatron.sync.cpu_engine import repack_experts, repack_tied_heads
from stare_megatron.sync.source import ParamSpec


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Worker side. `rank_offset`: rank in the group of this engine's first worker."""

    host: str
    port: int
    rank_offset: int
    world_size: int
    buffer_bytes: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The stream that follows; dtypes by their torch names."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def specs(self) -> list[ParamSpec]:
        return [
            ParamSpec(n, torch.__dict__[d], tuple(s))
            for n, d, s in zip(self.names, self.dtype_names, self.shapes, strict=True)
        ]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Trainer side. `host`: this machine's address as workers see it; `world_size`: 1 + all workers."""

    backend: ClassVar[str] = "gloo"
    host: str
    world_size: int
    buffer_bytes: int = wire.BUFFER_BYTES


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """In each engine worker."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group: wire.GlooGroup | None = None
    _buffer_bytes = wire.BUFFER_BYTES

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        config = self.parallel_config
        rank = init_info.rank_offset + config.data_parallel_index * config.world_size + config.rank
        self._buffer_bytes = init_info.buffer_bytes
        self._group = wire.GlooGroup.join(init_info.host, init_info.port, rank, init_info.world_size)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        repack_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        if self._group is None:
            raise RuntimeError("weights sent before init_weight_transfer_engine")
        load_weights: Callable[..., Any] = self.model.load_weights  # type: ignore[assignment]
        try:
            with disable_mtp_completeness_check():
                for weights in wire.receive(self._group, update_info.specs(), self._buffer_bytes):
                    load_weights(weights)
        except BaseException:
            self._group.close()  # the sender must not wait for us
            raise

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """On each trainer rank. Rank 0 sends; the others only make the passes over the source with it."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(
        self,
        client: VLLMWeightSyncClient,
        source: WeightSource,
        init_info: GlooTrainerInitInfo,
        group: wire.GlooGroup | None,
    ) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self._source = source
        self._group = group
        self._buffer_bytes = init_info.buffer_bytes

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        if source is None:
            raise ValueError("backend gloo needs a WeightSource")
        if not init_info.is_sender:
            return cls(client, source, init_info, None)
        store = wire.host_store(init_info.host)
        worker = GlooInitInfo(init_info.host, store.port, 1, init_info.world_size, init_info.buffer_bytes)
        # Both sides block until the group is complete: a worker's error must end the sender's waiting too.
        pool = ThreadPoolExecutor(2)
        joined: Future[Any] = pool.submit(client.init_weight_transfer_engine, asdict(worker))
        group: Future[Any] = pool.submit(wire.GlooGroup, store, 0, init_info.world_size)
        pool.shutdown(wait=False)
        for done in wait((joined, group), return_when=FIRST_EXCEPTION).done:
            done.result()
        return cls(client, source, init_info, group.result())

    def send_weights(self) -> None:
        specs = tuple(ParamSpec(m.name, m.dtype, m.shape) for m in self._source.metadata())
        if self._group is None:
            for _ in self._source:
                pass
            return
        info = GlooUpdateInfo(
            names=[s.name for s in specs],
            dtype_names=[str(s.dtype).removeprefix("torch.") for s in specs],
            shapes=[list(s.shape) for s in specs],
        )
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        try:
            received: Future[Any] = pool.submit(self.client.update_weights, asdict(info))

            def failed() -> None:
                if received.done():
                    received.result()

            wire.send(self._group, specs, iter(self._source), self._buffer_bytes, failed)
            received.result()
        except BaseException:
            self._group.close()  # the workers must not wait for us
            raise
        finally:
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
