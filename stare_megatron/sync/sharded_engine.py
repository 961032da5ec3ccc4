"""vLLM weight-transfer backend `sharded`: the engine's side of sharded pushes, in each of its workers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection
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
from stare_megatron.sync.link import Link
from stare_megatron.sync.load import Loader
from stare_megatron.sync.loaded import loaded_form
from stare_megatron.sync.receiver import Receiver
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
class _Joined:
    """What a worker knows after the handshake."""

    receiver: Receiver
    worker: int
    specs: dict[str, ParamSpec]
    needs: Needs


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
        whole = [spec.name for spec in needs.whole]
        receiver = Receiver.join(link, worker, _boxes(needs), whole, dtype=specs[0].dtype, where=self.device)
        self._joined = _Joined(receiver, worker, {spec.name: spec for spec in specs}, needs)

    def start_weight_update(self) -> None:
        self._loader = Loader(self.model, self.model_config, self._known().needs)
        self._loader.start()

    def receive_weights(self, update_info: ShardedUpdateInfo) -> None:
        joined, loader = self._known(), self._loader
        if loader is None:
            raise RuntimeError("start_weight_update comes before weights")
        cut = joined.needs.cut

        def take(need: int, box: Box, value: torch.Tensor) -> None:
            if need < len(cut):
                loader.take(cut[need], box, value)
            else:
                loader.take_whole(need - len(cut), box, value)

        with contextlib.ExitStack() as after_an_error:
            after_an_error.callback(loader.abandon)
            after_an_error.callback(joined.receiver.link.close)  # the senders must not wait for us
            joined.receiver.receive(take)
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
            read = loaded_form(modules[path], name)
            if read is None:
                continue
            for need in needs:
                value = read(need.target.where).reshape(need.box.shape)
                found[label(need.box, joined.worker)] = box_sum(value, need.box, joined.specs[need.box.name].shape)
        return found

    def shutdown(self) -> None:
        if self._joined is not None:
            self._joined.receiver.link.close()

    def _known(self) -> _Joined:
        if self._joined is None:
            raise RuntimeError("init_weight_transfer_engine comes first")
        return self._joined


def _parameter(need: Need) -> tuple[str, str]:
    return need.target.module, need.target.parameter


def _boxes(needs: Needs) -> list[Box]:
    return [need.box for need in needs.cut] + [Box(s.name, (0,) * len(s.shape), s.shape) for s in needs.whole]
