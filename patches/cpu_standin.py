"""What `torch.cuda` means inside of megatron.core on a CPU: one device, one stream, torch's own generator."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Stream:
    """The one queue of a CPU: everything is done when it is asked for."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        pass


class Event(Stream):
    """Always already reached."""

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


_STREAM = Stream()


class _Cuda:
    """The names megatron.core uses of `torch.cuda`; every other one is torch.cuda's own."""

    Stream = Stream
    Event = Event

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def current_stream(self, device: Any = None) -> Stream:
        return _STREAM

    default_stream = current_stream

    def set_stream(self, stream: Any) -> None:
        pass

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


cuda = _Cuda()
