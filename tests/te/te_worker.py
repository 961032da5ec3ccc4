"""What a rank does in the tests of Transformer Engine's layers: one model under both layer specs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from launch import Rank

from stare_megatron.host import device

# What Megatron-Core finds when it is imported is settled for the process.
with mock.patch.object(device, "has_transformer_engine", return_value=True):
    from step_cases import Ports


@contextlib.contextmanager
def layers(engine: bool) -> Iterator[None]:
    """Build with Transformer Engine's modules, as on an H100, or with the local ones."""
    import torch

    from stare_megatron.trainer import spec

    spec.providers.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(device, "has_transformer_engine", return_value=engine))
        if engine:  # its modules ask what they will run on
            stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=True))
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        yield
    spec.providers.cache_clear()


def run(here: Rank, *, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each case, by name: what was found. A case: `hf`, `mcore` (the same weights, converted), `trainer` (fields of
    a TrainerConfig), `out` (an empty folder)."""
    import dataclasses

    from stare_megatron.config import TrainerConfig
    from stare_megatron.trainer import parallel

    ports, found = Ports(here), {}
    for name, case in cases.items():
        trainer = TrainerConfig(world_size=here.world_size, **case["trainer"])
        parallel.initialize(trainer, **dataclasses.asdict(ports.next()), seed=5, timeout_s=60)
        found[name] = _both(Path(case["hf"]), Path(case["mcore"]), Path(case["out"]), trainer)
        parallel.shutdown()
    return found


def _both(hf: Path, mcore: Path, out: Path, trainer: Any) -> dict[str, Any]:
    engine, local = _build(hf, trainer, True), _build(hf, trainer, False)
    found = {
        "modules": sorted({type(m).__name__ for chunk in engine for m in chunk.modules()}),
        "communication": _communication(engine),
        "exported": [_wrong(chunks, hf) for chunks in (engine, local)],
        "marks": _marks(engine, local),
        "tensors": [_tensors(chunks) for chunks in (engine, local)],
        "converted": _wrong(_build(hf, trainer, True, mcore), hf),
    }
    for name, chunks, other in (("engine", engine, False), ("local", local, True)):
        _save(chunks, out / name)
        found[f"saved by {name}"] = _wrong(_build(hf, trainer, other, out / name), hf)
    return found


def _communication(engine: Sequence[Any]) -> list[tuple[str, int]]:
    """How the attentions of a rank exchange keys and values, and among how many; empty without context parallelism."""
    found = set()
    for module in (m for chunk in engine for m in chunk.modules()):
        if type(module).__name__ == "TEDotProductAttention" and module.config.context_parallel_size > 1:
            found.add((module.cp_comm_type, module.cp_group.size()))
    return sorted(found)


def _build(hf: Path, trainer: Any, engine: bool, mcore: Path | None = None) -> Sequence[Any]:
    import torch

    from stare_megatron.trainer.model import build_model

    if not engine:  # which refuse what is for Transformer Engine's attention
        local = {key: value for key, value in trainer.megatron.items() if key != "cp_comm_type"}
        trainer = trainer.model_copy(update={"megatron": local})
    with layers(engine):
        return build_model(hf, torch.float32, trainer, torch.device("cpu"), 128, mcore)


def _wrong(chunks: Sequence[Any], hf: Path) -> list[str]:
    """Names whose exported values are not the file's, bit for bit, or that only one of them has."""
    import torch
    from safetensors.torch import load_file

    from stare_megatron.trainer.bridge import export

    want = load_file(hf / "model.safetensors")
    got = {name: tensor.clone() for name, tensor in export(chunks, torch.float32)}
    common = [name for name in want if name in got and not torch.equal(want[name], got[name])]
    return common + sorted(want.keys() ^ got.keys())


def _marks(engine: Sequence[Any], local: Sequence[Any]) -> list[tuple[str, Any, Any]]:
    """Parameters whose shape or tensor-parallel marks differ between the two."""
    from megatron.core.utils import get_model_config

    from stare_megatron.models.entries import local_entries
    from stare_megatron.trainer.bridge import _Local, _local_experts

    def facts(parameter: Any) -> Any:
        if parameter is None:
            return None
        marks = [vars(parameter).get(name) for name in ("tensor_model_parallel", "partition_dim")]
        return (tuple(parameter.shape), *marks, vars(parameter).get("allreduce", True))

    shape, different = get_model_config(engine[0]).shape, []
    first, second = _Local(engine), _Local(local)
    for entry in local_entries(shape):
        for expert in range(len(_local_experts(shape, entry))):
            pair = [facts(model.find(entry, expert)) for model in (first, second)]
            if pair[0] != pair[1]:
                different.append((entry.saved, *pair))
    return different


def _tensors(chunks: Sequence[Any]) -> dict[str, Any]:
    """Of this rank's part of a checkpoint: whole shape, this rank's offset and number of the replica, by key."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from stare_megatron.trainer import checkpoint, model_state

    seen: dict[str, Any] = {}
    for chunk in chunks:
        for value in model_state.sharded(chunk.module, checkpoint.CONTENT).values():
            parts = value.build() if isinstance(value, ShardedTensorFactory) else value
            for part in _leaves(parts):
                assert isinstance(part, ShardedTensor), part
                seen[f"{part.key} {part.global_offset}"] = (part.global_shape, part.replica_id)
    return seen


def _leaves(parts: Any) -> Iterator[Any]:
    if isinstance(parts, dict | list | tuple) and not hasattr(parts, "key"):
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _leaves(part)
    else:
        yield parts


def _save(chunks: Sequence[Any], out: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing

    from stare_megatron.trainer import checkpoint, model_state

    if torch.distributed.get_rank() == 0:
        out.mkdir(parents=True)
    torch.distributed.barrier()
    state = {f"model{i}": model_state.sharded(c.module, checkpoint.CONTENT) for i, c in enumerate(chunks)}
    # With one chunk `checkpoint.begin_save` names its tensors alike: keys come from the modules.
    dist_checkpointing.save(state, str(out), content_metadata=dict(checkpoint.CONTENT))
    torch.distributed.barrier()
