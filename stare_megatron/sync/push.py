"""The trainer's side of a push, driven on every trainer rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stare_megatron.host.ports import free_port
from stare_megatron.models.hf_folder import spec_bytes
from stare_megatron.sync.fanout import EngineFanOut
from stare_megatron.sync.gloo_sender import GlooSender
from stare_megatron.sync.source import WeightStream, weight_source

if TYPE_CHECKING:
    import torch
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine


class Client:
    """What vLLM's trainer engines call: adds `version`, without which they finish an update, and with `plain_handles`
    makes CUDA IPC handles such as the engines' processes can pass on (see `sync.ipc`)."""

    def __init__(self, client: EngineFanOut, *, plain_handles: bool) -> None:
        self._client = client
        self._plain_handles = plain_handles
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._client.start_weight_update()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        if self._plain_handles:
            from stare_megatron.sync.ipc import plain

            assert isinstance(update_info, dict)
            update_info = plain(update_info)
        self._client.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._client.finish_weight_update(str(self.version))


class WeightPusher:
    """Pushes the policy into the running engines. Every trainer rank has one and calls it together with the others.

    Args:
        transport: `device.weight_transport()`: gloo, nccl or cuda_ipc.
        rank: trainer rank; rank 0 sends and is the only one that calls `client`.
        stream: the policy's parameters.
        client: the engines (rank 0; on other ranks it is not called).
        host: address of rank 0's machine as the engines see it.
    """

    def __init__(self, transport: str, rank: int, stream: WeightStream, client: EngineFanOut, host: str) -> None:
        self._transport = transport
        self._rank = rank
        self._stream = WeightStream(stream.specs, self._begin_pass)
        self._tensors = stream.tensors
        self._pass: Iterator[tuple[str, torch.Tensor]] | None = None
        self._client = Client(client, plain_handles=transport == "cuda_ipc")
        self._host = host
        self._world_size = 1 + sum(client.workers)
        self._engine: TrainerWeightTransferEngine | GlooSender | None = None

    def connect(self) -> None:
        """Rendezvous with all engine workers, before the first push."""
        if self._only_iterates():
            return
        if self._transport == "gloo":
            self._engine = GlooSender(self._client, self._stream, self._host, self._world_size)
            return
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._engine = WeightTransferTrainerFactory.trainer_init(
            self._init_info(), client=self._client, source=weight_source(self._stream)
        )

    def push(self, version: int) -> int:
        """Send all parameters; when it returns on rank 0 every engine samples with `version`. Returns the bytes that
        this rank sent, to all at once.

        After an error the engines must join again. All ranks have ended the push then, unless NCCL, which tells nobody
        that an engine is gone, keeps this one waiting, or the others with cuda_ipc.
        """
        if self._only_iterates():
            for _ in self._stream.tensors():
                pass
            return 0
        if self._engine is None:
            raise RuntimeError("connect() comes before push()")
        self._client.version = version
        self._pass = None
        with contextlib.ExitStack() as after_an_error:
            if self._transport in ("gloo", "nccl"):
                after_an_error.callback(self._finish_pass)
            self._engine.send_weights()
            after_an_error.pop_all()
        return sum(map(spec_bytes, self._stream.specs)) if self._rank == 0 else 0

    def _begin_pass(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._pass = self._tensors()
        return self._pass

    def _finish_pass(self) -> None:
        """When engines have failed: the other ranks, which only take part in the pass, wait in its collectives."""
        for _ in self._begin_pass() if self._pass is None else self._pass:
            pass

    def _only_iterates(self) -> bool:
        """A rank other than 0 of a broadcasting backend only takes part in the passes over the stream, so it can do
        without vLLM (9 s and hundreds of MB). With cuda_ipc every rank shares its GPU's memory."""
        return self._rank != 0 and self._transport in ("gloo", "nccl")

    def _init_info(self) -> TrainerInitInfo:
        if self._transport == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            return NCCLTrainerInitInfo(self._host, free_port(), self._world_size, rank=self._rank)
        if self._transport == "cuda_ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            # A tensor travels in one piece, and vLLM's buffer is as large as it is told, not as the largest tensor.
            largest = max(IPCTrainerInitInfo.packed_buffer_size_bytes, *map(spec_bytes, self._stream.specs))
            return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=largest, rank=self._rank)
        raise ValueError(f"no weight transport {self._transport!r}: gloo, nccl or cuda_ipc")
