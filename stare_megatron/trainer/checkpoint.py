"""Save and restore the trainer: model, optimizer, number of optimizer steps, random state.

Megatron-Core's distributed checkpoint: every rank writes its share (see `shares`), and any other TP x PP x DP (with
virtual stages, sequence parallelism) reads of it what it needs. Random states are per rank, so they come back only into
the same layout; nothing in the trainer draws from them while dropout is 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from stare_megatron.config import TrainerConfig
from stare_megatron.errors import MissingFilesError, UserError
from stare_megatron.host import cpus
from stare_megatron.trainer import model_state, parallel, precise, shares
from stare_megatron.trainer.writing import Writer, Writing

# `fully_reshardable`: optimizer state is stored per parameter, so any layout can load it.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}

_COMMON = "common_state/shard_0_1"  # as Megatron-Core 0.19 names what earlier versions write to `common.pt`


def writer(trainer: TrainerConfig) -> Writer:
    """What this rank writes its checkpoints with: as many threads as it has of its node's cores, as far as it may use
    them. A collective."""
    replicas = None if trainer.distributed_optimizer else parallel.dp_cp_group()
    return Writer(cpus.usable() // parallel.ranks_of_node(), replicas)


def begin_save(
    folder: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    trainer: TrainerConfig,
    writer: Writer,
    *,
    step: int,
    optimizer_steps: int,
    snapshot: bool,
) -> Writing:
    """Start to write this rank's share under `folder`, which is made. A collective.

    `step`: the loop's; `optimizer_steps`: done so far. `snapshot`: write a copy, so that the state may change
    after `Writing.copied`; else it may not before the writing has ended. The caller makes the folder's appearance
    atomic.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    make_moments(optimizer)
    with shares.in_place(optimizer):
        state, _ = _sharded_state(chunks, optimizer, is_loading=False)
        state |= {
            "step": step,
            "optimizer_steps": optimizer_steps,
            "random": _random_state(trainer),
        }
    parameters = (p for chunk in chunks for p in chunk.module.parameters())
    live = shares.live_storages(optimizer, parameters) if snapshot else set()
    return writer.begin(folder, state, CONTENT | {"layout": _layout(trainer)}, live)


def restore(
    folder: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, trainer: TrainerConfig
) -> tuple[int, int]:
    """Load what `begin_save` wrote, at this or another layout. A collective. Returns (step, optimizer steps done).

    Every rank reads its share to where it belongs; then the ranks that split an optimizer give each other parameters.

    Raises:
        UserError: no such checkpoint, or one of another model. MissingFilesError, on every rank and before anything is
            read: a file is not there that some rank has to read.
    """
    if not (folder / "metadata.json").is_file():
        raise UserError(f"{folder}: not a trainer checkpoint (no metadata.json)")
    if any(map(precise.is_precise, shares.parts(optimizer))):
        make_moments(optimizer)
    with shares.in_place(optimizer):
        try:
            common = _common(folder)
            content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
            wanted, in_place = _sharded_state(chunks, optimizer, is_loading=True)
            same_layout = content is not None and content.get("layout") == _layout(trainer)
            if same_layout:
                wanted["random"] = _random_state(trainer)
            # That every tensor is asked for once is upstream's check, for which each rank would get all ranks' lists.
            with _all_there(folder, common):
                state: Any = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
        except CheckpointingException as e:
            raise UserError(f"{folder}: cannot be loaded into this model: {e}") from e
        for i, chunk in enumerate(chunks):
            model_state.load(chunk.module, state.get(f"model{i}", {}), in_place[i])
        optimizer.load_state_dict(state["optimizer"])
    shares.gather_parameters(chunks, optimizer)
    if same_layout:
        random = state["random"]
        torch.set_rng_state(random["torch"])
        _tracker().set_states(random["tracker"])
    return int(state["step"]), int(state["optimizer_steps"])


def _common(folder: Path) -> dict[str, Any]:
    """What is not of one rank. Megatron-Core 0.19 has it in a file of the rank that was the first, which every rank
    reads there: here one that has the file does, for all. A collective.

    Raises:
        MissingFilesError: no rank has it.
    """
    index = FileSystemReader(folder).read_metadata()
    where = {key.fqn: info.relative_path for key, info in (index.storage_data or {}).items()}
    name = where.get(_COMMON, "common.pt")
    having: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(having, (folder / name).is_file())
    if True not in having:
        raise MissingFilesError(f"{folder}: no rank has {name}")
    found = [dist_checkpointing.load_common_state_dict(str(folder)) if dist.get_rank() == having.index(True) else None]
    dist.broadcast_object_list(found, having.index(True))
    return found[0] or {}


@contextlib.contextmanager
def _all_there(folder: Path, common: dict[str, Any]) -> Iterator[None]:
    """Within, a load reads nothing unless every rank has all files that its part of the plan names: where they lie on
    nodes' own disks, that depends on who is where. A collective of its own. `common` is not read again."""
    upstream: Any = FileSystemReader
    read, lacking = upstream.read_data, list[str]()
    read_common = serialization.load_common_state_dict

    def look_and_read(reader: FileSystemReader, plan: Any, planner: Any) -> Any:
        names = {reader.storage_data[item.storage_index].relative_path for item in plan.items}
        mine = sorted(name for name in names if not (folder / name).exists())
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        lacking.extend(f"rank {rank} has no {missing[0]}" for rank, missing in enumerate(everywhere) if missing)
        if lacking:
            raise FileNotFoundError(lacking[0])
        return read(reader, plan, planner)

    upstream.read_data = look_and_read
    serialization.load_common_state_dict = lambda _: common
    try:
        yield
    except CheckpointException as e:
        if not lacking:
            raise
        more = f", and {len(lacking) - 1} more" if lacking[1:] else ""
        raise MissingFilesError(f"{folder}: {lacking[0]}, which it has to read{more}") from e
    finally:
        upstream.read_data = read
        serialization.load_common_state_dict = read_common


def _sharded_state(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, is_loading: bool
) -> tuple[dict[str, Any], list[frozenset[str]]]:
    """The state, and of each chunk the names of what is in it as this rank's share, or not at all."""
    metadata = CONTENT | {"dp_cp_group": parallel.dp_cp_group()}
    models: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        # The unwrapped model: DistributedDataParallel would put "module." before every name.
        models[f"model{i}"] = model_state.sharded(chunk.module, metadata)
    together = models["model0"] if len(chunks) == 1 else models
    optimizer_state = optimizer.sharded_state_dict(together, is_loading=is_loading, metadata=metadata)
    split = {name: shares.split(model, optimizer) for name, model in models.items()}
    # Nothing empty: upstream takes that for what all ranks have in common.
    shared = {
        name: mine for name, own in split.items() if (mine := {key: pieces for key, pieces in own.items() if pieces})
    }
    state = {name: model for name, model in (models | {"shares": shared}).items() if model}
    return state | {"optimizer": optimizer_state}, [frozenset(own) for own in split.values()]


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has done no step the moments it begins with, zeros; saving asks for them.

    By a step without gradient, learning rate or decay, which is undone in the count of steps.
    """
    for part in shares.parts(optimizer):
        inner: Any = part.optimizer
        if any(inner.state.values()):
            continue
        if precise.is_precise(part):
            precise.make_state(inner)
            continue
        kept = [(group["lr"], group["weight_decay"]) for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
        for group, (lr, decay) in zip(inner.param_groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, decay
            if "step" in group:
                group["step"] = 0


def _layout(trainer: TrainerConfig) -> list[int]:
    return [
        trainer.world_size,
        trainer.tensor_parallel,
        trainer.pipeline_parallel,
        trainer.virtual_pipeline,
        trainer.context_parallel,
        trainer.expert_parallel,
    ]


def _random_state(trainer: TrainerConfig) -> ShardedObject:
    """This rank's generators, as one cell of an array over ranks."""
    state = {"torch": torch.get_rng_state(), "tracker": _tracker().get_states()}
    return ShardedObject("random", state, (trainer.world_size,), (dist.get_rank(),))


def _tracker() -> Any:
    """Megatron-Core's generators for tensor-parallel regions."""
    return tensor_parallel.get_cuda_rng_tracker()
