"""A push over CUDA IPC through vLLM's own sender, msgpack codec and receiver; only what asks a GPU is stood in for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from stare_megatron.host import device
from stare_megatron.sync.fanout import EngineFanOut
from stare_megatron.sync.ipc import plain, restored
from stare_megatron.sync.plugin import register
from stare_megatron.sync.push import WeightPusher
from stare_megatron.sync.source import ParamSpec, WeightStream

LIMIT = 4096


class Gpu:
    """What `reduce_tensor` gives for a CUDA tensor, its fields as torch 2.13 makes them, and its inverse."""

    def __init__(self) -> None:
        self.buffers: dict[bytes, torch.Tensor] = {}

    def reduce(self, tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        storage = tensor._typed_storage()
        handle = b"h%d" % len(self.buffers)
        self.buffers[handle] = tensor
        where = (0, handle, tensor.nbytes, 0, tensor.requires_grad, b"c\x00\xff", 3, b"", False)
        head = (type(tensor), tensor.size(), tensor.stride(), tensor.storage_offset(), type(storage), tensor.dtype)
        return None, head + where

    def rebuild(self, cls: Any, size: Any, stride: Any, offset: int, storage: Any, dtype: Any, *where: Any) -> Any:
        found = self.buffers[where[1]]
        assert (cls, tuple(size), tuple(stride), storage) == (
            torch.Tensor, tuple(found.shape), found.stride(), torch.storage.TypedStorage
        )  # fmt: skip
        assert (offset, dtype, where[-4:]) == (0, torch.uint8, (b"c\x00\xff", 3, b"", False))
        return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu, empty = Gpu(), torch.empty

    def on_cpu(*size: Any, **options: Any) -> torch.Tensor:
        return empty(*size, **(options | {"device": "cpu"}))

    monkeypatch.setattr(torch, "empty", on_cpu)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-5f"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", gpu.reduce)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", gpu.rebuild)
    # 1 GiB scaled down, in the default that is read and in the one that is taken.
    monkeypatch.setattr(IPCTrainerInitInfo, "packed_buffer_size_bytes", LIMIT)
    defaults: Any = IPCTrainerInitInfo.__init__
    monkeypatch.setattr(defaults, "__defaults__", tuple(LIMIT if v == 2**30 else v for v in defaults.__defaults__))
    return gpu


class Worker:
    """vLLM's worker as far as a push goes: the engine that the configured backend names, on a model that records."""

    def __init__(self) -> None:
        register()
        self.got: dict[str, torch.Tensor] = {}
        self.calls: list[str] = []
        kind: Any = WeightTransferEngineFactory._registry[device.weight_transport(colocated=True)]()
        self.engine = kind.__new__(kind)
        self.engine.device = torch.device("cpu", 0)
        self.engine._packed_importer = packed_tensor.PackedBufferImporter()
        self.engine.model = SimpleNamespace(load_weights=self.got.update)

    def call(self, method: str, arguments: Any) -> None:
        """As from an engine's front end to its core: through msgpack."""
        ((*args,),) = arguments
        self.calls.append(method)
        if method == "init_weight_transfer_engine":
            self.engine.init_transfer_engine(self.engine.parse_init_info(args[0]))
        elif method == "update_weights":
            request = WeightTransferUpdateRequest(args[0])
            sent = MsgpackEncoder().encode(("update_weights", None, (), {"update_info": request.update_info}))
            received = MsgpackDecoder().decode([bytes(part) for part in sent])[3]["update_info"]
            self.engine.receive_weights(self.engine.parse_update_info(received))


def test_weights_pass_vllms_codec_and_one_tensor_may_exceed_its_buffer(monkeypatch: pytest.MonkeyPatch, gpu: Gpu):
    monkeypatch.setattr(device, "current", lambda: device.Device.CUDA)
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    state = {
        "norm": torch.randn(64).bfloat16(),
        "embed": torch.randn(3 * LIMIT // 8, 4).bfloat16(),  # three times the buffer
        "proj": torch.randn(40, 10),
    }
    specs = tuple(ParamSpec(n, t.dtype, tuple(t.shape)) for n, t in state.items())
    worker = Worker()
    pusher = WeightPusher(
        device.weight_transport(colocated=True),
        0,
        WeightStream(specs, lambda: iter(state.items())),
        EngineFanOut([1], worker.call),
        "127.0.0.1",
    )
    pusher.connect()
    pusher.push(3)
    assert list(worker.got) == list(state)
    assert all(torch.equal(worker.got[n], t) and worker.got[n].dtype == t.dtype for n, t in state.items())
    assert worker.calls[:2] == ["init_weight_transfer_engine", "start_weight_update"]
    assert worker.calls[-1] == "finish_weight_update"


def test_a_handle_travels_by_names_of_torch_only():
    args = (torch.Tensor, torch.Size([2, 3]), (3, 1), torch.storage.TypedStorage, torch.bfloat16, b"\x00", None, True)
    there = plain({"ipc_handles": {"GPU-1": args}})["ipc_handles"]["GPU-1"]
    assert restored(there) == (torch.Tensor, (2, 3), *args[2:])
    for odd in (dict, object(), "torch.load", torch.device("cpu")):
        with pytest.raises(ValueError, match="not known here"):
            plain({"ipc_handles": {"GPU-1": (odd,)}})
    for name in ("torch.load", "torch.classes", "torch.Generator"):
        with pytest.raises(ValueError, match="names neither"):
            restored([name])
