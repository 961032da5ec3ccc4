"""vLLM weight-transfer backend `sharded`: the engine's side of sharded pushes, in each of its workers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from stare_megatron.models.boxes import Box
from stare_megatron.sync import wire
from stare_megatron.sync.bake import Need, Needs, bake
from stare_megatron.sync.check import box_sum
from stare_megatron.sync.link import Link, Slots, inbox, machine
from stare_megatron.sync.load import Loader
from stare_megatron.sync.loaded import loaded_form
from stare_megatron.sync.sharded import label
from stare_megatron.sync.source import ParamSpec


@dataclass
class ShardedInitInfo(WeightTransferInitInfo):
    """`name`: where the engine meets the ranks. `names`, `shapes`: of all of the policy's tensors, which travel in one
    dtype."""

    host: str
    port: int
    name: str
    senders: int
    workers: int
    names: list[str]
    dtype_name: str
    shapes: list[list[int]]

    def specs(self) -> list[ParamSpec]:
        dtype = torch.__dict__[self.dtype_name]
        return [ParamSpec(n, dtype, tuple(s)) for n, s in zip(self.names, self.shapes, strict=True)]


@dataclass
class ShardedUpdateInfo(WeightTransferUpdateInfo):
    version: int


@dataclass(frozen=True)
class _Message:
    """What comes: parts (number of the need, box) one after the other."""

    tag: int
    sender: int
    bytes: int
    parts: tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class _Joined:
    """What a worker knows after the handshake. `mapped`: memory of trainer ranks on this machine."""

    link: Link
    worker: int
    specs: dict[str, ParamSpec]
    needs: Needs
    messages: tuple[_Message, ...]
    mapped: dict[int, list[torch.Tensor]]
    dtype: torch.dtype


class ShardedWeightTransferEngine(WeightTransferEngine[ShardedInitInfo, ShardedUpdateInfo]):
    init_info_cls = ShardedInitInfo
    update_info_cls = ShardedUpdateInfo
    supports_draft_weight_update = False

    _joined: _Joined | None = None
    _loader: Loader | None = None

    def init_transfer_engine(self, init_info: ShardedInitInfo) -> None:
        config = self.parallel_config
        worker = config.data_parallel_index * config.world_size + config.rank
        store = wire.join_store(init_info.host, init_info.port)
        meeting = wire.PrefixStore(init_info.name, store)
        link = Link(meeting, init_info.name, init_info.senders + worker, init_info.senders, init_info.workers)
        specs = init_info.specs()
        needs = bake(self.model, specs)
        boxes = _boxes(needs)
        link.tell(
            f"worker {worker}",
            {
                "host": machine(),
                "boxes": [[box.name, box.begin, box.end] for box in boxes],
                "whole": [spec.name for spec in needs.whole],
            },
        )
        told = link.ask(f"take {worker}")
        messages = tuple(
            _Message(tag, sender, size, tuple((n, Box(boxes[n].name, tuple(b), tuple(e))) for _, n, b, e in parts))
            for tag, sender, size, parts in told["messages"]
        )
        mapped = {rank: Slots.at(address) for rank, address in told["slots"]}
        by_name = {spec.name: spec for spec in specs}
        self._joined = _Joined(link, worker, by_name, needs, messages, mapped, specs[0].dtype)

    def start_weight_update(self) -> None:
        self._loader = Loader(self.model, self.model_config, self._known().needs)
        self._loader.start()

    def receive_weights(self, update_info: ShardedUpdateInfo) -> None:
        joined, loader = self._known(), self._loader
        if loader is None:
            raise RuntimeError("start_weight_update comes before weights")
        cut = joined.needs.cut
        with contextlib.ExitStack() as after_an_error:
            after_an_error.callback(loader.abandon)
            after_an_error.callback(joined.link.close)  # the senders must not wait for us
            for need, box, value in _received(joined):
                if need < len(cut):
                    loader.take(cut[need], box, value)
                else:
                    loader.take_whole(need - len(cut), box, value)
            after_an_error.pop_all()

    def finish_weight_update(self) -> None:
        if self._loader is not None:
            self._loader.finish()
        self._loader = None

    def sums(self, labels: Collection[str]) -> dict[str, int]:
        """Checksums of the boxes that this worker holds now, by `label`, of those of `labels` or, where it is empty, of
        all; of those that its model keeps in a way that can be read."""
        joined, labels = self._known(), frozenset(labels)
        modules = dict(self.model.named_modules())
        found: dict[str, int] = {}
        wanted = [n for n in joined.needs.cut if not labels or label(n.box, joined.worker) in labels]
        for (path, name), needs in itertools.groupby(sorted(wanted, key=_parameter), _parameter):
            parameter = loaded_form(modules[path], name)
            if parameter is None:
                continue
            for need in needs:
                value = parameter[need.target.where].reshape(need.box.shape)
                found[label(need.box, joined.worker)] = box_sum(value, need.box, joined.specs[need.box.name].shape)
        return found

    def shutdown(self) -> None:
        if self._joined is not None:
            self._joined.link.close()

    def _known(self) -> _Joined:
        if self._joined is None:
            raise RuntimeError("init_weight_transfer_engine comes first")
        return self._joined


def _parameter(need: Need) -> tuple[str, str]:
    return need.target.module, need.target.parameter


def _boxes(needs: Needs) -> list[Box]:
    return [need.box for need in needs.cut] + [Box(s.name, (0,) * len(s.shape), s.shape) for s in needs.whole]


def _received(joined: _Joined) -> Iterator[tuple[int, Box, torch.Tensor]]:
    coming = [(m.tag, m.sender, m.bytes) for m in joined.messages]
    for message, got in zip(joined.messages, inbox(joined.link, coming, joined.mapped), strict=True):
        values, at = got.view(joined.dtype), 0
        for need, box in message.parts:
            yield need, box, values[at : at + box.elements].view(box.shape)
            at += box.elements
