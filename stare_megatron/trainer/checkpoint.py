"""Save and restore the trainer: model, optimizer, number of optimizer steps, random state.

Megatron-Core's distributed checkpoint: every rank writes its shards, and any other TP x PP x DP (with virtual stages,
sequence parallelism) reads them. Random states are per rank, so they come back only into the same layout; nothing in
the trainer draws from them while dropout is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from stare_megatron.config import TrainerConfig
from stare_megatron.errors import UserError
from stare_megatron.trainer import parallel

# `fully_reshardable`: optimizer state is stored per parameter, so any layout can load it.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def save(
    folder: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    trainer: TrainerConfig,
    *,
    step: int,
    optimizer_steps: int,
) -> None:
    """Write all shards under `folder`, which is made. A collective; returns when every rank is done.

    `step`: the loop's; `optimizer_steps`: done so far. The caller makes the folder's appearance atomic.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, is_loading=False) | {
        "step": step,
        "optimizer_steps": optimizer_steps,
        "random": _random_state(trainer),
    }
    content = CONTENT | {"layout": _layout(trainer)}
    dist_checkpointing.save(state, str(folder), content_metadata=content)
    dist.barrier()


def restore(
    folder: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, trainer: TrainerConfig
) -> tuple[int, int]:
    """Load what `save` wrote, at this or another layout. A collective. Returns (step, optimizer steps done).

    Raises:
        UserError: no such checkpoint, or one of another model.
    """
    if not (folder / "metadata.json").is_file():
        raise UserError(f"{folder}: not a trainer checkpoint (no metadata.json)")
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
        content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        wanted = _sharded_state(chunks, optimizer, is_loading=True)
        same_layout = content is not None and content.get("layout") == _layout(trainer)
        if same_layout:
            wanted["random"] = _random_state(trainer)
        state: Any = dist_checkpointing.load(wanted, str(folder))
    except CheckpointingException as e:
        raise UserError(f"{folder}: cannot be loaded into this model: {e}") from e
    for i, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state[f"model{i}"])
    optimizer.load_state_dict(state["optimizer"])
    if same_layout:
        random = state["random"]
        torch.set_rng_state(random["torch"])
        _tracker().set_states(random["tracker"])
    return int(state["step"]), int(state["optimizer_steps"])


def _sharded_state(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    metadata = CONTENT | {"dp_cp_group": parallel.dp_cp_group()}
    models: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        # The unwrapped model: DistributedDataParallel would put "module." before every name.
        model: Any = chunk.module
        models[f"model{i}"] = model.sharded_state_dict(metadata=metadata)
    together = models["model0"] if len(chunks) == 1 else models
    optimizer_state = optimizer.sharded_state_dict(together, is_loading=is_loading, metadata=metadata)
    return models | {"optimizer": optimizer_state}


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
