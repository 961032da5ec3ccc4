"""Settings that follow from the size of the model and the load where they are left open.

Time limits for what reads or moves the weights; on GPUs the engines' batches and, where trainer ranks share their
GPUs, the engines' part of the memory. Estimates in bytes; a GPU's memory is what its driver reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stare_megatron.config import Config
from stare_megatron.config.trainer import StateClass
from stare_megatron.errors import UserError
from stare_megatron.models.layout import push_buffers
from stare_megatron.models.shape import ModelShape
from stare_megatron.models.weights import engine_bytes
from stare_megatron.plan import parameters
from stare_megatron.run import folder as run_folder

if TYPE_CHECKING:
    from stare_megatron.data.benchmarks import Benchmark  # which imports pyarrow

_GIB = 2**30
_START_S, _PUSH_S, _SILENT_S = 600.0, 300.0, 1800.0
_SLOW_BYTES_S = 100e6  # a cold shared file system, or a slow network, per reader
# CUDA's contexts of a rank and an engine, NCCL's buffers.
_CONTEXTS_BYTES = 4 * _GIB
# Least an engine needs beside its weights, to run one batch and hold a few sequences.
_ENGINE_BYTES = 2 * _GIB
_MIN_SEQUENCES, _MAX_SEQUENCES = 8, 1024
_BATCHED_TOKENS = 8192
_UNKNOWN_SHARE = 0.4
_SHARE_BESIDE_OFFLOAD = 0.95  # of what is free, for what vLLM does not count


@dataclass(frozen=True)
class Load:
    """What engines are asked for at a time: `sequences`, in groups of at most `group`, each on one engine."""

    sequences: int
    group: int


def rollout_load(config: Config) -> Load:
    """Of a training step, and of the batches that are outstanding beside it."""
    r, s = config.rollout, config.sampling
    batches = s.max_staleness + 1 if s.mode == "stream" else 1
    return Load(batches * r.prompts_per_step * r.group_size, r.group_size)


def eval_load(benchmarks: Sequence[Benchmark]) -> Load:
    """Of an evaluation's samples; greedy responses are fewer."""
    sequences = sum(len(b.prompts) * b.samples for b in benchmarks)
    return Load(sequences, max((b.samples for b in benchmarks), default=1))


def with_time_limits(config: Config) -> Config:
    """`config` with `cluster.start_timeout`, `sync.push_timeout` and `watchdog.first`, seconds, where they are 0."""
    slow = run_folder.weight_bytes(config) / _SLOW_BYTES_S
    cluster = {"start_timeout": config.cluster.start_timeout or _START_S + slow}
    sync = {"push_timeout": config.sync.push_timeout or _PUSH_S + slow}
    watchdog = {"first": config.watchdog.first or _SILENT_S + slow}
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update=cluster),
            "sync": config.sync.model_copy(update=sync),
            "watchdog": config.watchdog.model_copy(update=watchdog),
        }
    )


def with_engine_sizes(config: Config, shape: ModelShape, gpu_bytes: int, load: Load, *, trainers: bool) -> Config:
    """`config` for engines on GPUs of `gpu_bytes` (0: unknown): what `[inference.vllm]` leaves open.

    vLLM's defaults are batches by the GPU's size, and 92 % of the GPU, as if it were alone there. `trainers`: ranks
    share the GPUs if `inference.placement` is `colocated`.

    Raises:
        UserError: engines and ranks cannot share a GPU of this size.
    """
    given, i = config.inference.vllm, config.inference
    chosen: dict[str, Any] = {}
    tokens = given.get("max_num_batched_tokens", _BATCHED_TOKENS)
    if "max_num_seqs" not in given:
        # Groups stay together, so that one engine may get a group more than another.
        share = math.ceil(load.sequences / i.engines) + load.group
        chosen["max_num_seqs"] = min(max(-(-share // 8) * 8, _MIN_SEQUENCES), _MAX_SEQUENCES, tokens)
    # Without chunked prefill a batch must hold the longest prompt; vLLM knows how large it is then.
    if "max_num_batched_tokens" not in given and given.get("enable_chunked_prefill", True):
        chosen["max_num_batched_tokens"] = max(tokens, given.get("max_num_seqs", 0))
    if trainers and i.placement == "colocated":  # a cache of a given size, too: vLLM asks at its start for so much
        chosen["gpu_memory_utilization"] = _share(config, shape, gpu_bytes)
    return config.model_copy(update={"inference": i.model_copy(update={"vllm": chosen | given})})


def rank_bytes(config: Config, shape: ModelShape) -> int:
    """What a rank holds from its first step on: weights, float32 gradients, optimizer state, and a reference policy
    that stays on its GPU."""
    return sum(class_bytes(config, shape).values()) + _device_reference(config, shape)


def resident_bytes(config: Config, shape: ModelShape) -> int:
    """What a rank keeps on its GPU while engines sample, as far as it follows from the model."""
    t = config.trainer
    stays = sum(size for name, size in class_bytes(config, shape).items() if name not in t.offload)
    return stays + _device_reference(config, shape) + (t.offload_residue_mb << 20 if t.offload else 0)


def arena_bytes(config: Config, shape: ModelShape) -> int:
    """What a rank keeps in host memory for `trainer.offload` and `algorithm.kl`."""
    state = parameters.arena_bytes(shape, config.trainer, config.model.dtype)
    return state + class_bytes(config, shape)["parameters"] * config.algorithm.kl.on_host


def _device_reference(config: Config, shape: ModelShape) -> int:
    """What a rank keeps of a reference policy on its GPU: its parameters once more."""
    return class_bytes(config, shape)["parameters"] * config.algorithm.kl.on_device


def class_bytes(config: Config, shape: ModelShape) -> dict[StateClass, int]:
    """State by class of a rank of the pipeline stage that has the most of it."""
    most = parameters.fullest(shape, config.trainer, config.model.dtype)
    return {"parameters": most.parameters, "gradients": most.gradients, "optimizer": most.optimizer}


def _step_bytes(config: Config, shape: ModelShape) -> int:
    """A rank's state in an optimizer step."""
    bundle = config.trainer.offload_step_mb << 20
    kept = class_bytes(config, shape)["optimizer"]
    return rank_bytes(config, shape) - (max(0, kept - bundle) if bundle else 0)


def _share(config: Config, shape: ModelShape, gpu_bytes: int) -> float:
    """`gpu_memory_utilization` of a colocated engine, as given or chosen: half of what is left beside what a rank holds
    for good and the buffers of a push, so that the other half is for a rank's activations. With `trainer.offload` ranks
    return those too, and it is nearly all that is left beside what stays.

    Raises:
        UserError: too much for the GPU, or too little for the engine's weights.
    """
    i, given = config.inference, config.inference.vllm.get("gpu_memory_utilization")
    if not gpu_bytes:
        return given if given is not None else _UNKNOWN_SHARE
    rank = resident_bytes(config, shape)
    engine = engine_bytes(shape, config.model.dtype, i.quantization) / i.tensor_parallel
    free = gpu_bytes - rank - _CONTEXTS_BYTES
    part = _SHARE_BESIDE_OFFLOAD if config.trainer.offload else 0.5
    if not config.trainer.offload:
        free -= push_buffers(shape, config.model.dtype, config.sync.method)
    share = given if given is not None else max(0, math.floor(100 * part * free / gpu_bytes)) / 100
    sizes = (
        f"a trainer rank holds {rank / _GIB:.1f} GiB while engines sample and an engine's weights take "
        f"{engine / _GIB:.1f} of the GPU's {gpu_bytes / _GIB:.1f} GiB"
    )
    cure = (
        "raise trainer.tensor_parallel, trainer.pipeline_parallel or inference.tensor_parallel, or set "
        "inference.placement=separate"
    )
    whole = _step_bytes(config, shape) + _CONTEXTS_BYTES
    if config.trainer.offload and whole > gpu_bytes:
        raise UserError(
            f"trainer.offload = {config.trainer.offload} makes too little room: an optimizer step has "
            f"{whole / _GIB:.1f} GiB on a GPU of {gpu_bytes / _GIB:.1f}; raise trainer.tensor_parallel, "
            "trainer.pipeline_parallel or trainer.world_size, or lower trainer.offload_step_mb, "
            f"{config.trainer.offload_step_mb} (0: no limit)"
        )
    if share * gpu_bytes < engine + _ENGINE_BYTES:
        raise UserError(f"inference.vllm.gpu_memory_utilization = {share:g} leaves an engine no room: {sizes}; {cure}")
    if share * gpu_bytes + rank + _CONTEXTS_BYTES > gpu_bytes:
        raise UserError(
            f"inference.vllm.gpu_memory_utilization = {share:g} leaves a trainer rank no room: {sizes}; lower it, "
            f"{cure}"
        )
    return share
