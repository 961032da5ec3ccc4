"""Everything that keeps a run from starting or fitting, at once, each with its cure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stare_megatron.config import Config, TrainerConfig
from stare_megatron.errors import UserError
from stare_megatron.models.layout import check_experts, check_layout
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan.hardware import Gpu
from stare_megatron.plan.memory import EngineRoom, Phase, Use
from stare_megatron.run.preflight import check_engine_layout, check_window

_GIB = 2**30


def of_layout(config: Config, shape: ModelShape, gpu: Gpu, nodes: int) -> list[str]:
    """What cannot be split or placed so. `nodes`: 0: as many as it takes."""
    t = config.trainer
    checks: Sequence[Callable[[], object]] = (
        *splits(t, shape),
        lambda: check_layout(t, True),
        lambda: check_experts(t, shape),
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


def of_memory(config: Config, uses: Sequence[Use], again: Callable[[Config], Sequence[Use]] | None) -> list[str]:
    """GPUs too small in a phase. `again`: the uses of another configuration, by which cures are
    tried; empty where it cannot be."""
    found = []
    for use in uses:
        if use.free >= 0:
            continue
        parts = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in _largest(use.parts))
        what = f"{use.phase.value}: {use.role} takes {use.total / _GIB:.1f} of {use.capacity / _GIB:.1f} GiB ({parts})"
        found.append(f"{what}; {_cure(config, use, again)}" if again else what)
    return found


def _largest(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda item: -item[1])[:3]


def _cure(config: Config, use: Use, again: Callable[[Config], Sequence[Use]]) -> str:
    """The first change that makes it fit, or what to change."""
    for changes in _candidates(config, use.phase):
        changed = changed_config(config, changes)
        now = [u for u in again(changed) if u.phase is use.phase]
        if now and all(u.free >= 0 for u in now):
            return "set " + ", ".join(f"{key}={value}" for key, value in changes.items())
    more = "more GPUs (trainer.world_size), which split the optimizer's state further"
    return f"no single setting is enough: raise trainer.tensor_parallel and trainer.pipeline_parallel, or take {more}"


def _candidates(config: Config, phase: Phase) -> Iterator[dict[str, Any]]:
    t = config.trainer
    logits = {} if t.logits_chunk_tokens else {"trainer.logits_chunk_tokens": 4096}
    full = {} if t.recompute == "full" else {"trainer.recompute": "full"}
    if phase in (Phase.UPDATE, Phase.SCORE):
        if t.recompute == "none":
            yield {"trainer.recompute": "selective"}
        for change in (logits, full, logits | full):
            if change:
                yield change
        tokens = t.micro_batch_tokens // 2
        while tokens >= config.window:
            yield logits | full | {"trainer.micro_batch_tokens": tokens}
            tokens //= 2
    elif config.inference.placement == "colocated":
        yield {"inference.placement": "separate"}
    for tensor in (2 * t.tensor_parallel, 4 * t.tensor_parallel, 8 * t.tensor_parallel):
        if tensor <= 8 and t.world_size % (tensor * t.pipeline_parallel * t.context_parallel) == 0:
            yield {"trainer.tensor_parallel": tensor, "trainer.sequence_parallel": True}
            yield logits | full | {"trainer.tensor_parallel": tensor, "trainer.sequence_parallel": True}


def changed_config(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with keys of its tables set, by their dotted names. Not checked again."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    known = {"trainer": config.trainer, "inference": config.inference}
    changed = {}
    for name, keys in tables.items():
        inner = {key.partition(".")[2]: keys.pop(key) for key in list(keys) if key.startswith("vllm.")}
        if inner:
            keys["vllm"] = config.inference.vllm | inner
        changed[name] = known[name].model_copy(update=keys)
    return config.model_copy(update=changed)
