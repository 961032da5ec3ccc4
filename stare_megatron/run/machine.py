"""Whether ranks and engines fit this machine: its GPUs, or its memory where there are none."""

from __future__ import annotations

import os
import resource

import psutil

from stare_megatron.config import Config
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.models.layout import kv_token_bytes
from stare_megatron.models.shape import ModelShape
from stare_megatron.run import folder as run_folder
from stare_megatron.run import sizing

_GIB = 2**30

# Resident memory of processes before any model, measured on Linux with torch 2.13, bytes.
_DRIVER_BYTES = 0.8 * _GIB
_RAY_BYTES = 0.5 * _GIB
_RANK_BYTES = 0.45 * _GIB
# An engine's process, its KV cache (VLLM_CPU_KVCACHE_SPACE) included.
_ENGINE_BYTES = 1.3 * _GIB + 1.0 * _GIB
# Of the logits of a micro-batch: themselves, a softmax, their gradient; float32.
_LOGITS_BYTES = 3 * 4
_BLOCKS = {False: 128, True: 16}  # vLLM's, on a CPU and on a GPU, tokens
# vLLM's attention on a CPU refuses smaller heads.
_CPU_MIN_HEAD_DIM = 32


def check_machine(config: Config, shape: ModelShape) -> tuple[str, ...]:
    """Ranks and engines against this machine's GPUs, or its memory; a cluster is checked when it is joined.

    Returns notes.

    Raises:
        UserError: they do not fit.
    """
    gpus = _visible_gpus(config)
    t, i = config.trainer, config.inference
    if gpus or config.cluster.address != "local":
        if i.placement == "colocated" and i.engines * i.tensor_parallel > t.world_size:
            raise UserError(
                f"inference.engines {i.engines} x inference.tensor_parallel {i.tensor_parallel} = "
                f"{i.engines * i.tensor_parallel} GPUs, but colocated engines share the trainer's "
                f"{t.world_size} (trainer.world_size); lower one, or set inference.placement=separate"
            )
        if config.cluster.address != "local":
            return ()
        _check_gpus(config, gpus)
        return _check_arenas(config, shape)
    _check_cpu_heads(config, shape)
    return _check_cpu_memory(config, shape)


def check_engine_machine(config: Config, shape: ModelShape) -> None:
    """Raises: UserError: engines alone do not fit this machine; a cluster is checked when it is joined."""
    gpus, i = _visible_gpus(config), config.inference
    if config.cluster.address != "local":
        return
    if not gpus:
        _check_cpu_heads(config, shape)
    elif i.engines * i.tensor_parallel > gpus:
        raise UserError(
            f"inference.engines {i.engines} x inference.tensor_parallel {i.tensor_parallel} = "
            f"{i.engines * i.tensor_parallel} GPUs, this machine shows {gpus}; lower one, or join a cluster with "
            "cluster.address"
        )


def on_gpus(config: Config) -> bool | None:
    """Whether ranks and engines are on GPUs; None on a cluster, which is known when it is joined."""
    return bool(_visible_gpus(config)) if config.cluster.address == "local" else None


def kv_cache_bytes(config: Config, shape: ModelShape) -> int:
    """What one sequence of the window takes of an engine rank's KV cache, in vLLM's blocks. Bytes."""
    token = kv_token_bytes(shape, config.inference.tensor_parallel, config.model.dtype)
    block = config.inference.vllm.get("block_size", _BLOCKS[bool(on_gpus(config))])
    return -(-config.window // block) * block * token


def _visible_gpus(config: Config) -> int:
    forced = os.environ.get("STARE_DEVICE", "")
    if forced not in ("", *(d.value for d in device.Device)):
        raise UserError(f"STARE_DEVICE = {forced!r}: use cpu, cuda, or leave it unset")
    gpus = len(device.gpu_names())
    if forced == device.Device.CUDA.value and not gpus and config.cluster.address == "local":
        raise UserError("STARE_DEVICE = 'cuda': no GPU is visible; unset it, or see what `nvidia-smi` says")
    return gpus


def _check_cpu_heads(config: Config, shape: ModelShape) -> None:
    if config.inference.engines and shape.head_dim < _CPU_MIN_HEAD_DIM:
        raise UserError(
            f"{config.model.path / 'config.json'}: head size {shape.head_dim}: vLLM needs at least "
            f"{_CPU_MIN_HEAD_DIM} on a CPU; use another model"
        )


def cpu_memory_bytes(config: Config, shape: ModelShape) -> int:
    """Estimated peak memory of a whole run on a CPU: driver, Ray, ranks, engines. Bytes."""
    t = config.trainer
    pack = min(
        max(t.micro_batch_tokens, config.window),
        config.rollout.prompts_per_step * config.rollout.group_size * config.window // t.data_parallel,
    )
    logits = pack // t.context_parallel * shape.vocab // t.tensor_parallel * _LOGITS_BYTES
    # The logits exist on the last pipeline stage only.
    ranks = t.world_size * (_RANK_BYTES + sizing.rank_bytes(config, shape) + sizing.arena_bytes(config, shape))
    ranks += t.world_size // t.pipeline_parallel * logits
    # vLLM keeps a second, repacked copy of what its matrix kernels read.
    engines = config.inference.engines * (_ENGINE_BYTES + run_folder.weight_bytes(config) * 2)
    return int(_DRIVER_BYTES + _RAY_BYTES + config.cluster.object_store_mb * 2**20 + ranks + engines)


def _check_gpus(config: Config, gpus: int) -> None:
    t, i = config.trainer, config.inference
    own = i.engines * i.tensor_parallel if i.placement == "separate" else 0
    if t.world_size + own > gpus:
        engines = f" + inference.engines {i.engines} x inference.tensor_parallel {i.tensor_parallel}" if own else ""
        cure = "lower one, or set inference.placement=colocated" if own else "lower it"
        raise UserError(
            f"trainer.world_size {t.world_size}{engines} = {t.world_size + own} GPUs, this machine shows {gpus}; "
            f"{cure}, or join a cluster with cluster.address"
        )


def _check_arenas(config: Config, shape: ModelShape) -> tuple[str, ...]:
    """Host memory for `trainer.offload` and `algorithm.kl`; a rank of a cluster checks its own node's when it starts.

    Raises:
        UserError: this machine has less.
    """
    ranks, memory = config.trainer.world_size, psutil.virtual_memory()
    need = ranks * sizing.arena_bytes(config, shape)
    kept = "" if not config.algorithm.kl.on else f" with algorithm.kl.residency = {config.algorithm.kl.residency!r}"
    said = (
        f"trainer.offload = {config.trainer.offload}{kept} keeps {need / _GIB:.1f} GiB in host memory for {ranks} "
        f"ranks, this machine has {memory.total / _GIB:.1f}"
    )
    if need > memory.total:
        raise UserError(f"{said}; offload fewer classes, or raise trainer.world_size")
    notes = []
    if need > memory.available:
        notes.append(f"{said}, of which {memory.available / _GIB:.1f} are free now: ranks may be refused it")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and limit < need // ranks:
        notes.append(
            f"{said}; it is page-locked, and RLIMIT_MEMLOCK is {limit >> 20} MiB a process: CUDA rarely minds, and if "
            "it does a rank says so; `ulimit -l unlimited` lifts it"
        )
    return tuple(notes)


def _check_cpu_memory(config: Config, shape: ModelShape) -> tuple[str, ...]:
    need = cpu_memory_bytes(config, shape)
    memory = psutil.virtual_memory()
    sizes = (
        f"trainer.world_size {config.trainer.world_size} ranks and inference.engines {config.inference.engines} need "
        f"about {need / _GIB:.1f} GiB of memory"
    )
    if need > memory.total:
        raise UserError(
            f"{sizes}, this machine has {memory.total / _GIB:.1f}; lower them, trainer.micro_batch_tokens "
            f"{config.trainer.micro_batch_tokens} or cluster.object_store_mb {config.cluster.object_store_mb}, or use "
            "a smaller model"
        )
    if need > memory.available:
        return (f"{sizes}, {memory.available / _GIB:.1f} are free now: it may swap or be killed",)
    return ()
