"""Process groups of a trainer rank: torch.distributed, Megatron-Core's parallel_state, seeds."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from stare_megatron.config import TrainerConfig
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.models.layout import check_layout
from stare_megatron.types.report import Position


def initialize(
    config: TrainerConfig,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    master_addr: str,
    master_port: int,
    seed: int,
    timeout_s: float,
) -> None:
    """Join the process group, build Megatron-Core's groups, seed every generator. A collective.

    `timeout_s`: how long a collective may wait for a rank, seconds.

    Raises:
        UserError: an impossible layout, or nobody answers at the rendezvous.
    """
    if world_size != config.world_size:
        raise UserError(f"started with {world_size} ranks, but trainer.world_size = {config.world_size}")
    check_layout(config, device.current() is device.Device.CUDA)
    device.torch_device(local_rank)  # NCCL works on the current device
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        # Without `device_id`: told of it, NCCL makes a communicator for each of Megatron-Core's groups at once, most of
        # which nobody uses: seconds of every start, and gigabytes of GPU memory (docs/gpu.md).
        torch.distributed.init_process_group(
            backend=device.distributed_backend(),
            init_method=f"tcp://{master_addr}:{master_port}",
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except torch.distributed.DistNetworkError as e:
        raise UserError(f"rank {rank}: no rendezvous at {master_addr}:{master_port}: {e}") from e
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual_pipeline(config),
        context_parallel_size=config.context_parallel,
        expert_model_parallel_size=config.expert_parallel,
        expert_tensor_parallel_size=config.expert_tensor_parallel,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        # Gloo twins of NCCL groups serve checkpoint formats that are not used here.
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def virtual_pipeline(config: TrainerConfig) -> int | None:
    """As Megatron-Core wants it: None unless there is more than one chunk a stage."""
    return config.virtual_pipeline if config.virtual_pipeline > 1 else None


def shutdown() -> None:
    """Leave all groups. Safe to call twice."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _group(found: Any) -> ProcessGroup:
    """Upstream says of its groups that they may also be numbers or lists: they are not."""
    return found


def tp_group() -> ProcessGroup:
    """Ranks that split each layer."""
    return _group(parallel_state.get_tensor_model_parallel_group())


def pp_group() -> ProcessGroup:
    """Ranks that split the layers into stages."""
    return _group(parallel_state.get_pipeline_model_parallel_group())


def etp_group() -> ProcessGroup:
    """Ranks that split each expert."""
    return _group(parallel_state.get_expert_tensor_parallel_group())


def ep_group() -> ProcessGroup:
    """Ranks that hold different experts."""
    return _group(parallel_state.get_expert_model_parallel_group())


def cp_group() -> ProcessGroup:
    """Ranks that split each sequence."""
    return _group(parallel_state.get_context_parallel_group())


def dp_cp_group() -> ProcessGroup:
    """Ranks that hold the same parameters and different tokens."""
    return _group(parallel_state.get_data_parallel_group(with_context_parallel=True))


def tensor_parallel_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def pipeline_parallel_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def context_parallel_rank() -> int:
    return parallel_state.get_context_parallel_rank()


def data_parallel_rank() -> int:
    """Which share of the batch this rank trains on; the same for all its TP, PP and CP peers."""
    return parallel_state.get_data_parallel_rank()


def is_last_stage() -> bool:
    """This rank holds the output layer, and so the logits and the loss."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def last_stage_rank() -> int:
    """Global rank of the last stage of this rank's pipeline: the source when a result of it is broadcast."""
    return parallel_state.get_pipeline_model_parallel_last_rank()


def ranks_of_node() -> int:
    """How many ranks are on this one's node, by its name. A collective."""
    names = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, platform.node())
    return names.count(platform.node())


def position() -> Position:
    """Of this rank."""
    return Position(
        data_parallel_rank=data_parallel_rank(),
        tensor_parallel_rank=tensor_parallel_rank(),
        pipeline_parallel_rank=pipeline_parallel_rank(),
        context_parallel_rank=context_parallel_rank(),
        is_last_stage=is_last_stage(),
    )
