"""vLLM's weight-transfer backend `ipc` with handles that travel as plain values; backend `cuda_ipc`.

A handle is what torch.multiprocessing makes of a CUDA tensor: classes, a dtype, numbers and bytes. Between vLLM's
front end and its engine core runs msgpack, which refuses classes and dtypes unless VLLM_ALLOW_INSECURE_SERIALIZATION
lets it pickle, and then it unpickles whatever comes. Here the few classes there are travel by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

BACKEND = "cuda_ipc"

_CLASSES: Mapping[str, type] = {
    kind.__qualname__: kind for kind in (torch.Tensor, torch.nn.Parameter, torch.TypedStorage, torch.UntypedStorage)
}
_MARK = "torch."


def plain(update_info: dict[str, Any]) -> dict[str, Any]:
    """`update_info` of vLLM's packed sender, its `ipc_handles` (GPU UUID -> what rebuilds a tensor) as msgpack takes
    them.

    Raises:
        ValueError: a handle holds something else than torch's classes, dtypes, numbers, text and bytes.
    """
    handles: Mapping[str, Sequence[Any]] = update_info["ipc_handles"]
    return update_info | {"ipc_handles": {uuid: [_plain(v) for v in args] for uuid, args in handles.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, type) and _CLASSES.get(value.__qualname__) is value:
        return _MARK + value.__qualname__
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if (
        value is None
        or isinstance(value, bool | int | float | bytes)
        or (isinstance(value, str) and not value.startswith(_MARK))
    ):
        return value
    raise ValueError(f"a CUDA IPC handle holds {value!r}, which is not known here")


def restored(value: Any) -> Any:
    """The inverse of what `plain` does to one value; sequences come back as tuples."""
    if isinstance(value, list | tuple):
        return tuple(restored(v) for v in value)
    if isinstance(value, str) and value.startswith(_MARK):
        name = value.removeprefix(_MARK)
        found = _CLASSES.get(name) or torch.__dict__.get(name)
        if name not in _CLASSES and not isinstance(found, torch.dtype):
            raise ValueError(f"{value!r} names neither a class of torch's tensors nor a dtype")
        return found
    return value


@dataclass
class PlainUpdateInfo(IPCWeightTransferUpdateInfo):
    """One packed chunk, as `plain` made it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ipc_handles, dict):
            raise ValueError("the backend cuda_ipc takes packed chunks only")
        self.ipc_handles = {uuid: restored(args) for uuid, args in self.ipc_handles.items()}


class CudaIpcWeightTransferEngine(IPCWeightTransferEngine):
    """In each engine worker: vLLM's, but for how a handle is written."""

    update_info_cls = PlainUpdateInfo
