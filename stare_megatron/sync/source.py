"""What the trainer hands over: parameters by Hugging Face name, without importing vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from vllm.distributed.weight_transfer.base import WeightSource


class ParamSpec(NamedTuple):
    """One parameter as it travels: Hugging Face name, dtype on the wire, full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightStream:
    """The policy's parameters, re-iterable.

    `specs` lists all of them, the same on every rank. `tensors()` starts a fresh pass that yields each (name, full
    tensor) in that order, one at a time; passes are collective, so all trainer ranks make them together. Only the
    tensors of rank 0 are sent.

    Example:
        WeightStream((ParamSpec("lm_head.weight", torch.float32, (112, 64)),), lambda: iter(model.items()))
    """

    specs: tuple[ParamSpec, ...]
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]

    def checked(self) -> Iterator[tuple[str, torch.Tensor]]:
        """A pass that compares every tensor with its spec: the receiver cuts the stream by the specs alone.

        Raises:
            ValueError: naming the first parameter that differs from its spec, is missing, or is too many.
        """
        count = 0
        for count, (name, tensor) in enumerate(self.tensors(), start=1):
            if count > len(self.specs):
                raise ValueError(f"the trainer exports {name!r}, which is not among its {len(self.specs)} parameters")
            spec = self.specs[count - 1]
            got = ParamSpec(name, tensor.dtype, tuple(tensor.shape))
            if got != spec:
                raise ValueError(f"the trainer exports {got} where it declared {spec}")
            yield name, tensor
        if count < len(self.specs):
            raise ValueError(f"the trainer's export ended before {self.specs[count].name!r}")


def weight_source(stream: WeightStream) -> WeightSource:
    """`stream` as vLLM's WeightSource."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class StreamSource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*spec) for spec in stream.specs]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return stream.checked()

    return StreamSource()
