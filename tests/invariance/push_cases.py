"""What trainer ranks do in the tests of sharded pushes: real Megatron-Core ranks that push into vLLM's workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_workers import Workers
from launch import Rank

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Pushed:
    """`unlike`: boxes this rank holds that differ from the export. `sent`: bytes. `sums`: shares, by engine.
    `carriers`: by engine, to each worker. `in_use`: of GPU's buffers afterwards."""

    unlike: list[str]
    sent: int
    sums: dict[str, dict[str, str]]
    carriers: dict[str, list[str]]
    in_use: int


@contextmanager
def _model(here: Rank, path: Path, port: int, trainer: dict[str, Any]) -> Iterator[tuple[list[Any], Any]]:
    """This rank's chunks, and the dtype."""
    import torch

    from stare_megatron.config import TrainerConfig
    from stare_megatron.trainer import parallel
    from stare_megatron.trainer.model import build_model

    config = TrainerConfig(world_size=here.world_size, **trainer)
    place = dataclasses.asdict(dataclasses.replace(here, master_port=port))
    parallel.initialize(config, **place, seed=5, timeout_s=300)
    dtype = getattr(torch, DTYPE)
    try:
        yield build_model(path, dtype, config, torch.device("cpu"), 64), dtype
    finally:
        parallel.shutdown()


def _pusher(here: Rank, chunks: list[Any], dtype: Any) -> Any:
    import torch

    from stare_megatron.sync.sharded import ShardedPusher
    from stare_megatron.sync.source import ParamSpec
    from stare_megatron.sync.wire import host_store, join_store
    from stare_megatron.trainer import bridge

    specs = [ParamSpec(*meta) for meta in bridge.metadata(chunks[0].config.shape, dtype)]
    store = host_store("127.0.0.1") if here.rank == 0 else None
    port = [store.port if store else 0]
    torch.distributed.broadcast_object_list(port, src=0)
    store = store or join_store("127.0.0.1", port[0])
    return ShardedPusher(here.rank, here.world_size, specs, lambda: bridge.holdings(chunks), store, "127.0.0.1")


def run(here: Rank, *, cases: Sequence[dict[str, Any]]) -> list[Pushed]:
    """Each case: `path`, `port`, `trainer`, `engines` to push into, and the `places` of the ranks, (machine, GPU) each;
    None: as it is. With a GPU there is a stand-in for it."""
    import pytest
    from gpu_stand_in import Gpu

    from stare_megatron.sync import sharded
    from stare_megatron.sync.place import Place

    found = []
    for case in cases:
        engines: list[Workers] = case["engines"]
        gpu = Gpu()
        with pytest.MonkeyPatch.context() as patches, _model(here, case["path"], case["port"], case["trainer"]) as made:
            chunks, dtype = made
            if case["places"]:
                place = Place(*case["places"][here.rank])
                patches.setattr(sharded, "place", lambda device, place=place: place)
                if place.gpu:
                    gpu.install(patches.setattr)
            pusher = _pusher(here, chunks, dtype)
            told = pusher.connect({engine.name: engine.fan_out() for engine in engines})
            assert told == []
            pusher.push(1)
            sent = pusher.push(2)
            names = [spec.name for spec in pusher._specs]
            sums = {engine.name: pusher.sums(names, engine.name) for engine in engines}
            carriers = {name: [c.name for c in engine.carriers] for name, engine in pusher._engines.items()}
            found.append(Pushed(_unlike(chunks, dtype), sent, sums, carriers, gpu.in_use))
    return found


def _unlike(chunks: list[Any], dtype: Any) -> list[str]:
    import torch

    from stare_megatron.trainer import bridge

    whole = {name: tensor.clone() for name, tensor in bridge.export(chunks, dtype)}
    return [
        str(box)
        for box, view in bridge.holdings(chunks)
        if not torch.equal(whole[box.name][tuple(map(slice, box.begin, box.end))], view)
    ]


def faults(here: Rank, *, path: Path, port: int, first: Workers, second: Workers) -> list[str]:
    """An engine that comes late, one that dies in a push, and one that goes on afterwards: errors of the pushes."""
    from stare_megatron.errors import RunError

    said = []
    with _model(here, path, port, {}) as (chunks, dtype):
        pusher = _pusher(here, chunks, dtype)
        pusher.connect({first.name: first.fan_out()})
        pusher.push(1)
        pusher.connect({second.name: second.fan_out()})  # late
        pusher.push(2, [second.name])
        first.call("die_in_push")
        for name in (first.name, second.name):
            try:
                pusher.push(3, [name])
                said.append("")
            except (RunError, RuntimeError, EOFError) as e:
                said.append(f"{type(e).__name__}: {e}")
    return said
