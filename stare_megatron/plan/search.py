"""Layouts for the same GPUs, ranked by the time of a step, each with what speaks for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stare_megatron.config import Config
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan import violations
from stare_megatron.plan.cures import BUNDLE_MB, CHUNK_TOKENS, can_be_precise, changed_config, movable
from stare_megatron.plan.estimate import Given, Plan, make, memory_of, ranks_fit, roomiest_share
from stare_megatron.plan.moves import moves
from stare_megatron.plan.timing import Ranks

# Layouts of the ranks, for each offload, that are tried with several of the engines; with another placement, fewer.
_FINALISTS, _FINALISTS_ELSEWHERE = 12, 4
_SHARE = "inference.vllm.gpu_memory_utilization"
_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Proposal:
    """`changes`: settings that differ from the run's, by key."""

    changes: dict[str, Any]
    plan: Plan

    @property
    def why(self) -> str:
        """In words: what bounds it, and what it leaves."""
        p = self.plan
        free = p.tightest()
        return (
            f"update by {p.update.bound}, MFU {p.mfu:.0%}, bubbles {p.update.bubble_share:.0%}, "
            f"{free.free / 2**30:.0f} GiB free in the {free.phase.value}"
        )


def search(config: Config, shape: ModelShape, given: Given) -> list[Proposal]:
    """Those that fit, fastest first. The number of GPUs and the batch stay; of the ranks TP, PP and its virtual stages,
    CP, EP, recomputation, micro-batches, chunks of logits and offload vary, and an Adam in fewer bytes where a layout
    fits with it alone; of the engines TP; and the placement, where sampling allows both. What is wrong with the
    configuration as it stands, such as a window too long, leaves nothing to propose."""
    found: dict[str, Proposal] = {}
    for placed in _placements(config):
        for away in _offloads(changed_config(config, placed)):
            count = _FINALISTS_ELSEWHERE if placed else _FINALISTS
            for changes in _finalists(changed_config(config, placed | away), shape, given)[:count]:
                for engines in _engines(changed_config(config, placed), shape):
                    whole = placed | away | changes | engines
                    plan = _planned(config, whole, shape, given)
                    if plan is not None:
                        found[repr(sorted(whole.items()))] = Proposal(_differing(config, whole), plan)
    return sorted(found.values(), key=lambda proposal: proposal.plan.seconds)


def _planned(config: Config, whole: dict[str, Any], shape: ModelShape, given: Given) -> Plan | None:
    """Its plan, None where it does not fit. `whole`: gets the engines' share."""
    changed = changed_config(config, whole)
    # With `offload` the run itself chooses nearly all that ranks leave.
    if changed.inference.placement == "colocated" and not changed.trainer.offload:
        whole[_SHARE] = roomiest_share(memory_of(changed, shape, given)[1], given.machine.gpu)
        if not whole[_SHARE]:
            return None
        changed = changed_config(config, whole)
    plan = make(changed, shape, given, cures=False)
    return plan if not plan.violations and plan.tightest().free >= 0 else None


def _placements(config: Config) -> Iterator[dict[str, Any]]:
    """The same GPUs, shared or a part of them for the engines alone."""
    i, gpus = config.inference, violations.gpus_needed(config)
    yield {}
    if i.placement == "separate" and not config.sampling.ahead:
        yield {
            "inference.placement": "colocated", "inference.engines": gpus, "inference.tensor_parallel": 1,
            "trainer.world_size": gpus,
        }  # fmt: skip
    for engines in sorted({gpus // 4, gpus // 2, 3 * gpus // 4} - {0}):
        if i.placement == "separate" and engines == i.engines * i.tensor_parallel:
            continue
        yield {
            "inference.placement": "separate", "inference.engines": engines, "inference.tensor_parallel": 1,
            "trainer.world_size": gpus - engines,
        }  # fmt: skip


def _offloads(config: Config) -> Iterator[dict[str, Any]]:
    """Nothing, and all that may leave."""
    for classes in ([], movable(config)):
        yield {"trainer.offload": classes, "trainer.offload_step_mb": 0}


def _finalists(config: Config, shape: ModelShape, given: Given) -> list[dict[str, Any]]:
    """The fastest layouts of the ranks that fit in scoring and update, one of each split of the model."""
    ranked: list[tuple[float, int, dict[str, Any]]] = []
    for layout in _layouts(config, shape, given):
        if violations.of_layout(changed_config(config, layout), shape, given.machine.gpu, given.nodes):
            continue
        fitting = (m for m in _measures(config, given) if ranks_fit(changed_config(config, layout | m), shape, given))
        measure = next(fitting, None)
        if measure is not None:
            changed = changed_config(config, layout | measure)
            ranks = Ranks(changed, shape, given.machine, given.lengths)
            seconds = ranks.score().seconds + ranks.update().seconds + moves(changed, shape, given.machine).seconds
            ranked.append((seconds, len(ranked), layout | measure))
    return [changes for _, _, changes in _distinct(sorted(ranked))]


def _measures(config: Config, given: Given) -> Iterator[dict[str, Any]]:
    """What saves memory, by what it costs in time: bundles nothing, an Adam in fewer bytes Transformer Engine, chunks
    of logits the head once more, recomputation a part of every layer."""
    states: list[dict[str, Any]] = [{}]
    if "optimizer" in config.trainer.offload:
        states.append({"trainer.offload_step_mb": BUNDLE_MB})
    if can_be_precise(config, given.machine.layers):
        states += [state | {"trainer.optimizer.precision_aware": True} for state in states]
    for recompute, chunk in itertools.product(("none", "selective", "full"), (0, CHUNK_TOKENS)):
        for state in states:
            yield {"trainer.recompute": recompute, "trainer.logits_chunk_tokens": chunk} | state


def _differing(config: Config, changes: dict[str, Any]) -> dict[str, Any]:
    """Those that the configuration does not have already."""
    have = {f"trainer.{key}": value for key, value in config.trainer} | {
        f"inference.{key}": value for key, value in config.inference
    }
    have |= {f"trainer.optimizer.{key}": value for key, value in config.trainer.optimizer}
    have |= {f"inference.vllm.{key}": value for key, value in config.inference.vllm.items()}
    return {key: value for key, value in changes.items() if have.get(key) != value}


def _split(changes: dict[str, Any]) -> tuple[int, ...]:
    return tuple(changes[f"trainer.{size}_parallel"] for size in ("tensor", "pipeline", "context", "expert"))


def _distinct(ranked: list[tuple[float, int, dict[str, Any]]]) -> list[tuple[float, int, dict[str, Any]]]:
    """The fastest of each split of the model."""
    best: dict[tuple[int, ...], tuple[float, int, dict[str, Any]]] = {}
    for entry in ranked:
        best.setdefault(_split(entry[2]), entry)
    return list(best.values())


def _layouts(config: Config, shape: ModelShape, given: Given) -> Iterator[dict[str, Any]]:
    world = config.trainer.world_size
    experts = [e for e in _SIZES if shape.experts and shape.experts.number % e == 0] or [1]
    sequences = config.rollout.prompts_per_step * config.rollout.group_size // config.trainer.updates_per_batch
    budgets = sorted({max(config.window, n) for n in (8192, 16384, 32768)})
    for tensor in (n for n in _SIZES if n <= given.machine.gpu.per_node and shape.heads % n == 0):
        for pipeline in (n for n in _SIZES if shape.layers % n == 0):
            chunks = [n for n in (1, 2, 4) if n == 1 or (pipeline > 1 and shape.layers // pipeline % n == 0)]
            for context in (1, 2, 4, 8):
                ranks = tensor * pipeline * context
                if world % ranks or world // ranks > sequences:
                    continue
                for expert in experts:
                    if (world // pipeline) % expert:
                        continue
                    for virtual, tokens in itertools.product(chunks, budgets):
                        yield _changes(config, (tensor, pipeline, context, expert), virtual, tokens)


def _changes(config: Config, sizes: tuple[int, int, int, int], virtual: int, tokens: int) -> dict[str, Any]:
    tensor, pipeline, context, expert = sizes
    changes: dict[str, Any] = {
        "trainer.tensor_parallel": tensor,
        "trainer.pipeline_parallel": pipeline,
        "trainer.virtual_pipeline": virtual,
        "trainer.context_parallel": context,
        "trainer.expert_parallel": expert,
        "trainer.sequence_parallel": tensor > 1,
        "trainer.recompute_modules": [],
        "trainer.micro_batch_tokens": tokens,
    }
    if expert > 1 and tensor > 1:
        changes["trainer.megatron"] = config.trainer.megatron | {"expert_tensor_parallel_size": 1}
    return changes


def _engines(config: Config, shape: ModelShape) -> Iterator[dict[str, Any]]:
    """The same GPUs in engines of 1 to 8."""
    gpus = config.inference.engines * config.inference.tensor_parallel
    for tensor in (1, 2, 4, 8):
        if gpus % tensor == 0 and shape.heads % tensor == 0:
            yield {"inference.tensor_parallel": tensor, "inference.engines": gpus // tensor}
