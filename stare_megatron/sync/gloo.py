"""vLLM weight-transfer backend `gloo`, the workers' end: CPU tensors from trainer rank 0 to all workers of all engines.

Modelled on vLLM's `nccl` backend (vllm/distributed/weight_transfer/nccl_engine.py): one group of the sender (rank 0)
and all workers, a handshake that carries the wire parameters, one `update_weights` a push, layerwise reload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
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
        repack_tied_heads(self.model, packed=True)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
