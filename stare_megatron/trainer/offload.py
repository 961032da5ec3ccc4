"""What a rank holds on its device, by class, and what of it is away in host memory.

Gradients are given up and come back as zeros; parameters and optimizer state (master weights and moments) go to one
host allocation made at the start, the arena, and come back bit for bit. Storages move, not tensors: a storage that is
resized to 0 and back keeps every view of it, so that Megatron-Core's parameters, their buffer, its shards and what the
optimizer was given stay views of the same memory. The same on a CPU, where it saves nothing and shows that it is right.

Nothing may touch a tensor that is away: on a CPU the process dies of it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from stare_megatron.config.trainer import StateClass
from stare_megatron.errors import RunError
from stare_megatron.host import copies
from stare_megatron.trainer.float8 import forget_copies
from stare_megatron.trainer.residue import largest
from stare_megatron.trainer.shares import parts
from stare_megatron.types import Measured

log = logging.getLogger(__name__)

CLASSES: tuple[StateClass, ...] = ("parameters", "gradients", "optimizer")
_KEPT: tuple[StateClass, ...] = ("parameters", "optimizer")  # the rest is not copied
_ALIGNED = 512
# Storages below this are gathered on the device, and a bundle of them is copied at once: a copy of a few kilobytes
# takes as long as one of a megabyte.
_SMALL = 1 << 20
_BUNDLE = 32 << 20


@dataclass(frozen=True, eq=False)
class _Away:
    """A storage that is resized to 0, the size it had and where in its class's part of the arena it is, bytes."""

    storage: torch.UntypedStorage
    size: int
    offset: int


class Offload:
    """Moves a rank's state between its device and host memory.

    Args:
        moved: the classes that may be away. The optimizer must have its moments by now if its state is one.
        residue_bytes: on a GPU, most that may be left of a rank while all of `moved` is away, beside the classes that
            stay.

    Raises:
        RunError: the host has no memory for the arena.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        moved: Sequence[StateClass],
        place: torch.device,
        residue_bytes: int,
    ) -> None:
        self._chunks = chunks
        self._optimizer = optimizer
        self._moved: tuple[StateClass, ...] = tuple(name for name in CLASSES if name in moved)
        self._place = place
        self._residue_bytes = residue_bytes
        self._beside = 0
        self._away: dict[StateClass, list[_Away]] = {}
        self._regions: dict[StateClass, torch.Tensor] = {}
        sizes: dict[StateClass, int] = {
            name: _places([s.nbytes() for s in self.storages(name)])[1] for name in self._moved if name in _KEPT
        }
        self._arena_B = copies.host_block(sum(sizes.values()))
        start = 0
        for name, size in sizes.items():
            self._regions[name] = self._arena_B[start : start + size]
            start += size
        if self.moves:
            sizes_MB = ", ".join(f"{name} {size >> 20} MiB" for name, size in self.sizes().items())
            log.info("offload %s: %s; arena %d MiB", ", ".join(self._moved), sizes_MB, self._arena_B.numel() >> 20)
        self._stream = copies.copy_stream()
        self._seconds = {"time/offload": 0.0, "time/onload": 0.0}

    @property
    def moves(self) -> bool:
        """Whether any class is ever away."""
        return bool(self._moved)

    @property
    def away(self) -> tuple[StateClass, ...]:
        """The classes that are in host memory now."""
        return tuple(name for name in CLASSES if name in self._away)

    def measured(self) -> tuple[Measured, ...]:
        """Sizes of the classes and the arena, and what is on the device, MB; seconds of moves since the last call."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        sizes = self.sizes()
        here = copies.allocated_bytes() or sum(size for name, size in sizes.items() if name not in self._away)
        megabytes = {f"memory/trainer_{name}": size for name, size in sizes.items()}
        megabytes |= {"memory/trainer_resident": here, "memory/trainer_arena": self._arena_B.numel()}
        values = seconds | {name: size / 2**20 for name, size in megabytes.items()}
        return tuple(Measured(name, value) for name, value in values.items())

    def sizes(self) -> Mapping[StateClass, int]:
        """Bytes of each class, wherever it is."""
        return {
            name: sum(s.size for s in self._away[name])
            if name in self._away
            else sum(s.nbytes() for s in self.storages(name))
            for name in CLASSES
        }

    def bring(self, *names: StateClass) -> tuple[StateClass, ...]:
        """Bring classes to the device that are away; returns them. Gradients come as zeros.

        Raises:
            RunError: the device has no room; those that did not come are still away, whole.
        """
        began = time.perf_counter()
        brought: list[StateClass] = [name for name in CLASSES if name in names and name in self._away]
        for name in brought:
            away = self._away[name]
            self._allocate(name, away)
            if name in _KEPT:
                with copies.on_stream(self._stream):
                    _copy(away, self._regions[name], out=False)
            else:
                for item in away:
                    _bytes(item.storage).zero_()
            del self._away[name]
        if brought:
            copies.wait_for(self._stream)
            self._seconds["time/onload"] += time.perf_counter() - began
        return tuple(brought)

    def put_away(self, *names: StateClass) -> None:
        """Move those of `names` that may be away and are not. Their memory is torch's until `give_back`."""
        began = time.perf_counter()
        leaving: list[StateClass] = [name for name in self._moved if name in names and name not in self._away]
        if "parameters" in leaving:
            forget_copies(self._chunks)
        for name in leaving:
            storages = self.storages(name)
            sizes = [storage.nbytes() for storage in storages]
            offsets, room = _places(sizes)
            leave = [_Away(*item) for item in zip(storages, sizes, offsets, strict=True)]
            if name in _KEPT:
                if room > self._regions[name].numel():
                    raise RuntimeError(
                        f"{name}: {sum(sizes)} bytes do not fit the arena's {self._regions[name].numel()}"
                    )
                self._leave(leave, self._regions[name])
            for item in leave:
                _empty(item.storage)
            self._away[name] = leave
        if leaving:
            self._seconds["time/offload"] += time.perf_counter() - began

    def bundles(
        self, params: Sequence[torch.Tensor], state: Mapping[Any, Any], size: int
    ) -> Generator[list[int], None, None]:
        """Bring the optimizer state of some of `params` after the other, in their order: master weights that are away,
        and moments in `state`. Yields the indices of those whose state is on the device until the next are asked for.

        `size`: most of it at a time, bytes; the state of one parameter comes whole.

        Raises:
            RunError: the device has no room.
        """
        away = {item.storage._cdata: item for item in self._away["optimizer"]}
        here: list[int] = []
        brought: dict[int, _Away] = {}
        for i, param in enumerate(params):
            tensors = [param, *(t for t in state[param].values() if isinstance(t, torch.Tensor))]
            own = {key: away[key] for key in (_storage(t)._cdata for t in tensors) if key in away}
            more = sum(item.size for key, item in own.items() if key not in brought)
            if here and sum(item.size for item in brought.values()) + more > size:
                yield from self._with(list(brought.values()), here)
                here, brought = [], {}
            here.append(i)
            brought |= own
        if here:
            yield from self._with(list(brought.values()), here)

    def _with(self, away: Sequence[_Away], here: list[int]) -> Iterator[list[int]]:
        region_B, began = self._regions["optimizer"], time.perf_counter()
        self._allocate("optimizer", away)
        with copies.on_stream(self._stream):
            _copy(away, region_B, out=False)
        copies.wait_for(self._stream)
        self._seconds["time/onload"] += time.perf_counter() - began
        try:
            yield here
        finally:
            began = time.perf_counter()
            self._leave(away, region_B)
            for item in away:
                _empty(item.storage)
            self._seconds["time/offload"] += time.perf_counter() - began

    @contextlib.contextmanager
    def present(self, *names: StateClass) -> Iterator[None]:
        """Within it these classes are on the device; afterwards those that were away are away again.

        Raises:
            RunError: the device has no room for them.
        """
        brought = self.bring(*names)
        try:
            yield
        finally:
            self.put_away(*brought)

    def give_back(self) -> None:
        """Return freed memory to the device, for other processes. Does nothing where no class is ever away."""
        if self.moves:
            copies.release_cache()

    def clear(self) -> None:
        """Put everything away that may be, and give its memory back.

        Raises:
            RunError: on a GPU, more is left than the classes that stay and the residue that is allowed; names the
                largest tensors.
        """
        if not self.moves:
            return
        self.put_away(*self._moved)
        self.give_back()
        left = copies.allocated_bytes()
        stays = sum(size for name, size in self.sizes().items() if name not in self._away)
        allowed = self._residue_bytes + self._beside + stays
        if left > allowed:
            raise RunError(
                f"{left / 2**20:,.0f} MiB of a trainer rank are left on its GPU while engines sample, "
                f"{allowed / 2**20:,.0f} were expected (trainer.offload_residue_mb {self._residue_bytes >> 20} beside "
                f"the classes that stay); the largest: {'; '.join(largest(self._place, self._names()))}"
            )

    def contents(self, name: StateClass) -> Iterator[bytes]:
        """The bytes of each storage of a class that is on the device."""
        for storage in self.storages(name):
            yield _bytes(storage).to("cpu", copy=True).numpy().tobytes()

    def _leave(self, leave: Sequence[_Away], region_B: torch.Tensor) -> None:
        with copies.on_stream(self._stream):
            _copy(leave, region_B, out=True)
        copies.wait_for(self._stream)  # the memory is another's as soon as it is freed

    def _allocate(self, name: StateClass, away: Sequence[_Away]) -> None:
        try:
            for item in away:
                if item.storage.resizable():
                    item.storage.resize_(item.size)
        except torch.OutOfMemoryError as e:
            for item in away:
                item.storage.resize_(0)
            copies.release_cache()
            need = sum(item.size for item in away)
            raise RunError(
                f"no room on the GPU for a trainer rank's {name}, {need / 2**20:,.0f} MiB: {copies.free_bytes() >> 20} "
                "MiB are free; lower inference.vllm.gpu_memory_utilization or trainer.micro_batch_tokens"
            ) from e

    def stays(self, size: int) -> None:
        """Something else of this rank, of `size` bytes, is on the device for good."""
        self._beside += size

    def storages(self, name: StateClass) -> list[torch.UntypedStorage]:
        """Those of a class that is on the device, each once, in an order that stays."""
        found = {storage._cdata: storage for storage in map(_storage, self._tensors(name))}
        if name == "optimizer":  # float32 parameters are their own master weights
            for other in (*self._tensors("parameters"), *self._tensors("gradients")):
                found.pop(_storage(other)._cdata, None)
        return list(found.values())

    def _tensors(self, name: StateClass) -> Iterator[torch.Tensor]:
        if name == "optimizer":
            for part in parts(self._optimizer):
                for p in (p for group in part.optimizer.param_groups for p in group["params"]):
                    state = part.optimizer.state[p].values() if p in part.optimizer.state else ()
                    own = (p, *(t for t in state if isinstance(t, torch.Tensor)))
                    yield from (t for t in own if self._is_here(t))
            return
        chunk: Any  # its `buffers` are not those of a module
        for chunk in self._chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                if name == "gradients":
                    yield buffer.grad_data
                elif buffer.param_data is not None:
                    yield buffer.param_data
            if name == "parameters":
                yield from chunk.module.parameters()

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 1 and tensor.device == self._place  # counts of steps are single numbers

    def _names(self) -> dict[int, str]:
        """What the storages are of that this object knows, by their addresses."""
        return {storage.data_ptr(): name for name in CLASSES for storage in self.storages(name) if storage.nbytes()}


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _empty(storage: torch.UntypedStorage) -> None:
    if storage.resizable():
        storage.resize_(0)
    else:  # on a CPU: numpy was given a view of it, as for a checksum. What reads it now reads NaN
        _bytes(storage).fill_(0xFF)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 [size], a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportArgumentType]


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where storages of these sizes are in the arena, and where they end: small ones close together, bytes."""
    offsets, end, small = [], 0, False
    for size in sizes:
        if not (small and size < _SMALL):
            end = -(-end // _ALIGNED) * _ALIGNED
        small = size < _SMALL
        offsets.append(end)
        end += size
    return offsets, -(-end // _ALIGNED) * _ALIGNED


def _runs(items: Sequence[_Away]) -> Iterator[list[_Away]]:
    """What is copied at once: several small storages that are neighbours in the arena, or one large."""
    run: list[_Away] = []
    for item in items:
        size = sum(before.size for before in run)
        joins = run and item.offset == run[0].offset + size and size + item.size <= _BUNDLE
        if run and not (joins and max(item.size, run[-1].size) < _SMALL):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _copy(items: Sequence[_Away], region_B: torch.Tensor, *, out: bool) -> None:
    """Between storages and their places in the arena: `out` of the device, or into it."""
    for run in _runs(items):
        sizes = [item.size for item in run]
        host_B = region_B[run[0].offset : run[0].offset + sum(sizes)]
        views = [_bytes(item.storage) for item in run]
        if out:
            host_B.copy_(torch.cat(views) if len(views) > 1 else views[0], non_blocking=True)
        elif len(views) > 1:
            here_B = host_B.to(views[0].device, non_blocking=True)
            torch._foreach_copy_(views, list(here_B.split(sizes)))  # pyright: ignore[reportPrivateImportUsage]
        else:
            views[0].copy_(host_B, non_blocking=True)
