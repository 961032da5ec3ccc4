"""What an engine's worker needs of the Hugging Face tensors, found by running its model's own `load_weights` dry.

The model's parameters and the tensors it is given are stand-ins without storage ("meta" tensors), and every copy of a
part of one of the latter into a part of one of the former is written down. vLLM's backend `sharded_rdt` finds its plan
so, too (vllm/distributed/weight_transfer/sharded_rdt_fake.py), by a subclass of Tensor; here torch's dispatcher is
asked, which sees views by any operation, and values that are no views.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stare_megatron.models.boxes import Box
from stare_megatron.sync.source import ParamSpec

_COPY = torch.ops.aten.copy_.default


@dataclass(frozen=True)
class Target:
    """Where a box goes: the block of `module`'s parameter `parameter` (as it is when weights are loaded) that begins at
    `begin` and has extent `shape`, which is the box's but for dimensions of size 1."""

    module: str
    parameter: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def where(self) -> tuple[slice, ...]:
        return tuple(slice(b, b + n) for b, n in zip(self.begin, self.shape, strict=True))


@dataclass(frozen=True)
class Need:
    box: Box
    target: Target


@dataclass(frozen=True)
class Needs:
    """`cut`: blocks, in the model's order. `whole`: tensors that the worker wants whole, for its model's `load_weights`
    does something else to them than to copy parts of them, and `modules`: paths of those that they go into. What is in
    neither is not for this worker."""

    cut: tuple[Need, ...]
    whole: tuple[ParamSpec, ...] = ()
    modules: tuple[str, ...] = ()


@torch.no_grad()
def bake(model: torch.nn.Module, specs: Sequence[ParamSpec]) -> Needs:
    """What `model` needs of the tensors `specs`. The model is left as it was; it must not run meanwhile.

    Modules whose weights are stored otherwise than they are loaded, by a quantization, take whole tensors.

    Raises:
        RuntimeError: a parameter gets nothing.
    """
    from stare_megatron.sync.loaded import is_quantized

    kept = [tuple(path.rpartition(".")[::2]) for path, _ in model.named_parameters()]  # of tied ones the first
    with _without_storage(model):
        recorder = _Recorder(model)
        for spec in specs:
            recorder.source(spec)
        load: Any = model.load_weights
        try:
            with recorder:
                load([(spec.name, tensor) for spec, tensor in recorder.sources()])
        except (RuntimeError, NotImplementedError):  # it asks for values, which stand-ins do not have
            loaded = tuple(path for path, m in model.named_modules() if any(True for _ in m.parameters(recurse=False)))
            return Needs((), tuple(specs), loaded)
    needs = [need for spec in specs for need in recorder.needs.get(spec.name, [])]
    modules = dict(model.named_modules())
    whole = set(recorder.uncut)
    whole |= {need.box.name for need in needs if is_quantized(modules[need.target.module])}
    # A module is loaded in one way or the other.
    while True:
        spoilt = {need.target.module for need in needs if need.box.name in whole} | {
            module for name in whole for module in recorder.touched.get(name, ())
        }
        more = {need.box.name for need in needs if need.target.module in spoilt} - whole
        if not more:
            break
        whole |= more
    filled = {(need.target.module, need.target.parameter) for need in needs}
    for path, name in kept:
        if (path, name) not in filled and path not in spoilt:
            raise RuntimeError(f"none of the policy's tensors goes into the engine's {path}.{name}")
    return Needs(
        tuple(need for need in needs if need.box.name not in whole),
        tuple(spec for spec in specs if spec.name in whole),
        tuple(sorted(spoilt)),
    )


@contextmanager
def _without_storage(model: torch.nn.Module) -> Iterator[None]:
    """The model's parameters as they are when weights are loaded, without storage; put back afterwards."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        _get_original_loader,
        _place_kernel_tensors,
        get_layerwise_info,
    )
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
    from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors

    layers = list(model.modules())
    for layer in layers:
        info = get_layerwise_info(layer)
        info.kernel_tensors = get_layer_params_buffers(layer)
        info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
        restore_layer_on_meta(layer, info)
        for tensor in get_layer_tensors(layer).values():
            if hasattr(tensor, "weight_loader"):  # which an earlier reload may have left wrapped
                tensor.weight_loader = _get_original_loader(tensor)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for layer in layers:
            info = get_layerwise_info(layer)
            _place_kernel_tensors(layer, info)
            info.reset()


@dataclass
class _Source:
    spec: ParamSpec
    tensor: torch.Tensor


class _Recorder(TorchDispatchMode):
    """Writes down copies from sources into parameters, and does not make them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.needs: dict[str, list[Need]] = {}
        self.uncut: set[str] = set()
        self.touched: dict[str, set[str]] = {}
        self._by_storage: dict[int, _Source] = {}
        self._derived: dict[int, tuple[torch.Tensor, frozenset[str]]] = {}
        self._targets: dict[int, tuple[str, str, torch.Tensor]] = {}
        for path, module in model.named_modules():
            for name, tensor in itertools.chain(
                module.named_parameters(recurse=False), module.named_buffers(recurse=False)
            ):
                self._targets.setdefault(_storage(tensor), (path, name, tensor))

    def source(self, spec: ParamSpec) -> None:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        self._by_storage[_storage(tensor)] = _Source(spec, tensor)

    def sources(self) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
        for source in self._by_storage.values():
            yield source.spec, source.tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _COPY and _storage(args[0]) in self._targets:
            self._copied(args[0], args[1])
            return args[0]
        names = frozenset().union(*(self._names(arg) for arg in tree_leaves((args, kwargs))))
        done = func(*args, **(kwargs or {}))
        if names:
            for value in tree_leaves(done):
                if isinstance(value, torch.Tensor) and _storage(value) not in self._by_storage:
                    self._derived[_storage(value)] = (value, names)  # kept, so that its storage's address stays its own
                    if (target := self._targets.get(_storage(value))) is not None:
                        self._spoil(names, target[0])
        return done

    def _names(self, value: Any) -> frozenset[str]:
        """Of the sources that a value is of, or was computed from."""
        if not isinstance(value, torch.Tensor):
            return frozenset()
        if source := self._by_storage.get(_storage(value)):
            return frozenset([source.spec.name])
        return self._derived[_storage(value)][1] if _storage(value) in self._derived else frozenset()

    def _spoil(self, names: frozenset[str], module: str) -> None:
        self.uncut |= names
        for name in names:
            self.touched.setdefault(name, set()).add(module)

    def _copied(self, into: torch.Tensor, value: torch.Tensor) -> None:
        path, name, parameter = self._targets[_storage(into)]
        source = self._by_storage.get(_storage(value))
        if source is None:
            self._spoil(self._names(value), path)
            return
        taken, put = _block(value, source.tensor), _block(into, parameter)
        if taken is None or put is None or _trim(value.shape) != _trim(into.shape):
            self._spoil(frozenset([source.spec.name]), path)
            return
        begin, shape = taken
        box = Box(source.spec.name, begin, tuple(b + n for b, n in zip(begin, shape, strict=True)))
        self.needs.setdefault(box.name, []).append(Need(box, Target(path, name, *put)))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _trim(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _block(view: torch.Tensor, whole: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Begin and extent of the block of contiguous `whole` that `view`, of its storage, is; None if it is no block, or
    one seen in another order or as another type."""
    if not whole.is_contiguous() or view.dtype != whole.dtype or not view.numel():
        return None
    offset = view.storage_offset() - whole.storage_offset()
    begin = []
    for stride in whole.stride():
        begin.append(offset // stride)
        offset %= stride
    # The view's dimensions of more than one element are, in order, some of the whole's.
    extents = {stride: n for stride, n in zip(view.stride(), view.shape, strict=True) if n != 1}
    order = [stride for stride, n in zip(view.stride(), view.shape, strict=True) if n != 1]
    if order != sorted(order, reverse=True) or len(extents) != len(order):
        return None
    shape = []
    for stride, n in zip(whole.stride(), whole.shape, strict=True):
        shape.append(extents.pop(stride, 1) if n != 1 else 1)
    inside = all(b + n <= size for b, n, size in zip(begin, shape, whole.shape, strict=True))
    return (tuple(begin), tuple(shape)) if not extents and inside else None
