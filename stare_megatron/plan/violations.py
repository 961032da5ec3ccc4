"""Everything that keeps a run from starting or fitting, at once, each with its cure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from stare_megatron.config import Config, TrainerConfig
from stare_megatron.errors import UserError
from stare_megatron.models.layout import check_experts, check_fp8, check_layout
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan.cures import Cures
from stare_megatron.plan.hardware import Gpu
from stare_megatron.plan.memory import EngineRoom, Use
from stare_megatron.run.preflight import check_engine_layout, check_window

_GIB = 2**30
_NOTHING_ELSE = (
    "no setting that was tried is enough: raise trainer.tensor_parallel and trainer.pipeline_parallel, or take more "
    "GPUs (trainer.world_size), which split the optimizer's state further"
)


def of_layout(config: Config, shape: ModelShape, gpu: Gpu, nodes: int) -> list[str]:
    """What cannot be split or placed so. `nodes`: 0: as many as it takes."""
    t = config.trainer
    checks: Sequence[Callable[[], object]] = (
        *splits(t, shape),
        lambda: check_layout(t, True),
        lambda: check_experts(t, shape),
        lambda: check_fp8(t, shape, None),
        lambda: check_engine_layout(config, shape),
        lambda: check_window(config, shape),
    )
    return [*refusals(checks), *_placing(config, gpu, nodes)]


def splits(t: TrainerConfig, shape: ModelShape) -> list[Callable[[], object]]:
    """Checks of each split of the model by itself, so that all that is wrong is found."""
    alone = {"tensor_parallel": 1, "pipeline_parallel": 1, "virtual_pipeline": 1, "expert_parallel": 1}

    def split(**sizes: int) -> Callable[[], None]:
        return lambda: shape.check_layout(**(alone | sizes))

    return [
        split(tensor_parallel=t.tensor_parallel),
        split(pipeline_parallel=t.pipeline_parallel, virtual_pipeline=t.virtual_pipeline),
        split(expert_parallel=t.expert_parallel),
    ]


def refusals(checks: Sequence[Callable[[], object]]) -> list[str]:
    """What each check that does not pass says."""
    found = []
    for check in checks:
        try:
            check()
        except UserError as e:
            found.append(str(e))
    return found


def _placing(config: Config, gpu: Gpu, nodes: int) -> Iterator[str]:
    t, i = config.trainer, config.inference
    engines = i.engines * i.tensor_parallel
    if i.placement == "colocated" and engines > t.world_size:
        yield (
            f"inference.engines {i.engines} x inference.tensor_parallel {i.tensor_parallel} = {engines} GPUs, but "
            f"colocated engines share the trainer's {t.world_size} (trainer.world_size); lower one, or set "
            "inference.placement=separate"
        )
    yield from too_many(gpus_needed(config), gpu, nodes, f"{t.world_size} or inference.engines {i.engines}")
    yield from crossing(gpu, {"trainer": t.tensor_parallel, "inference": i.tensor_parallel})


def too_many(need: int, gpu: Gpu, nodes: int, lower: str) -> Iterator[str]:
    """A run that takes more GPUs than its nodes have. `lower`: what to lower, after `trainer.world_size`."""
    if nodes and need > nodes * gpu.per_node:
        yield (
            f"the run takes {need} GPUs, --nodes {nodes} of {gpu.per_node} are {nodes * gpu.per_node}; lower "
            f"trainer.world_size {lower}, or add nodes"
        )


def crossing(gpu: Gpu, sizes: Mapping[str, int]) -> Iterator[str]:
    """Tensor parallelism, by its table, that does not stay within a node."""
    for table, size in sizes.items():
        if size > gpu.per_node:
            yield f"{table}.tensor_parallel = {size} crosses a node of {gpu.per_node} GPUs; lower it"


def gpus_needed(config: Config) -> int:
    """Of trainer and engines."""
    i = config.inference
    own = i.engines * i.tensor_parallel if i.placement == "separate" else 0
    return config.trainer.world_size + own


def of_engines(config: Config, room: EngineRoom, share: float) -> list[str]:
    """Engines that cannot hold one sequence of the window. `share`: of a GPU, that they could have beside ranks."""
    i = config.inference
    more = share - room.budget / room.gpu
    if more >= 0.01 and room.kv + more * room.gpu >= config.window * room.token:
        cure = f"set inference.vllm.gpu_memory_utilization = {share:g}, which the ranks leave"
    else:
        cure = "raise inference.tensor_parallel, or set inference.placement=separate"
    if room.kv <= 0:
        return [
            f"an engine's weights ({room.weights / _GIB:.1f} GiB a GPU) and work ({room.work / _GIB:.1f}) do not fit "
            f"its part of a GPU, {room.budget / _GIB:.1f} GiB; {cure}"
        ]
    if room.at_full < 1:
        return [
            f"an engine's KV cache of {room.kv / _GIB:.1f} GiB holds less than one sequence of the window, "
            f"{config.window} tokens; {cure}, or lower rollout.max_response_tokens (inference.tensor_parallel = "
            f"{i.tensor_parallel})"
        ]
    return []


def of_memory(uses: Sequence[Use], cures: Cures | None) -> list[str]:
    """GPUs too small in a phase, each with its cure where there are `cures`."""
    found = []
    for use in uses:
        if use.free >= 0:
            continue
        parts = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in _largest(use.parts))
        what = f"{use.phase.value}: {use.role} takes {use.total / _GIB:.1f} of {use.capacity / _GIB:.1f} GiB ({parts})"
        found.append(f"{what}; {cures.of(use.phase) or _NOTHING_ELSE}" if cures else what)
    return found


def _largest(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda item: -item[1])[:3]
