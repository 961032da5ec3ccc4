"""Layouts for the same GPUs, ranked by the time of a step, each with what speaks for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stare_megatron.config import Config
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan import violations
from stare_megatron.plan.cures import changed_config
from stare_megatron.plan.estimate import Given, Plan, make, memory_of, ranks_fit, roomiest_share
from stare_megatron.plan.timing import Ranks

_FINALISTS = 6  # layouts of the ranks that are tried with several layouts of the engines
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
    """Those that fit, fastest first. GPUs, placement and batch stay; TP, PP, CP, EP of the ranks, their recomputation,
    micro-batches and chunks, and the engines' TP vary."""
    ranked = []
    for changes in _layouts(config, shape, given):
        changed = changed_config(config, changes)
        if violations.of_layout(changed, shape, given.machine.gpu, given.nodes):
            continue
        if not ranks_fit(changed, shape, given):
            continue
        ranks = Ranks(changed, shape, given.machine, given.lengths)
        ranked.append((ranks.score().seconds + ranks.update().seconds, len(ranked), changes))
    found: dict[str, Proposal] = {}
    for _, _, changes in _distinct(sorted(ranked)):
        for engines in _engines(config, shape):
            whole = changes | engines
            # With `offload` the run itself chooses nearly all that ranks leave.
            if config.inference.placement == "colocated" and not config.trainer.offload:
                used = memory_of(changed_config(config, whole), shape, given)[1]
                whole[_SHARE] = roomiest_share(used, given.machine.gpu)
            if not whole.get(_SHARE, 1.0):
                continue
            plan = make(changed_config(config, whole), shape, given, cures=False)
            if not plan.violations and plan.tightest().free >= 0:
                found[repr(sorted(whole.items()))] = Proposal(_differing(config, whole), plan)
    return sorted(found.values(), key=lambda proposal: proposal.plan.seconds)


def _differing(config: Config, changes: dict[str, Any]) -> dict[str, Any]:
    """Those that the configuration does not have already."""
    have = {f"trainer.{key}": value for key, value in config.trainer} | {
        f"inference.{key}": value for key, value in config.inference
    }
    have |= {f"inference.vllm.{key}": value for key, value in config.inference.vllm.items()}
    return {key: value for key, value in changes.items() if have.get(key) != value}


def _distinct(ranked: list[tuple[float, int, dict[str, Any]]]) -> list[tuple[float, int, dict[str, Any]]]:
    """The fastest of each split of the model, the first few."""
    best: dict[tuple[Any, ...], tuple[float, int, dict[str, Any]]] = {}
    for entry in ranked:
        split = tuple(entry[2][f"trainer.{size}_parallel"] for size in ("tensor", "pipeline", "context", "expert"))
        best.setdefault(split, entry)
    return list(best.values())[:_FINALISTS]


def _layouts(config: Config, shape: ModelShape, given: Given) -> Iterator[dict[str, Any]]:
    world = config.trainer.world_size
    experts = [e for e in _SIZES if shape.experts and shape.experts.number % e == 0] or [1]
    sequences = config.rollout.prompts_per_step * config.rollout.group_size // config.trainer.updates_per_batch
    budgets = sorted({max(config.window, n) for n in (8192, 16384, 32768)})
    for tensor in (n for n in _SIZES if n <= given.machine.gpu.per_node and shape.heads % n == 0):
        for pipeline in (n for n in _SIZES if shape.layers % n == 0):
            for context in (1, 2, 4, 8):
                ranks = tensor * pipeline * context
                if world % ranks or world // ranks > sequences:
                    continue
                for expert in experts:
                    if (world // pipeline) % expert:
                        continue
                    for recompute in ("none", "selective", "full"):
                        for tokens in budgets:
                            yield _changes(config, tensor, pipeline, context, expert, recompute, tokens)


def _changes(
    config: Config, tensor: int, pipeline: int, context: int, expert: int, recompute: str, tokens: int
) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "trainer.tensor_parallel": tensor,
        "trainer.pipeline_parallel": pipeline,
        "trainer.virtual_pipeline": 1,
        "trainer.context_parallel": context,
        "trainer.expert_parallel": expert,
        "trainer.sequence_parallel": tensor > 1,
        "trainer.recompute": recompute,
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
