"""Where actors run. On GPUs: one placement-group bundle a GPU, sorted by node so that neighbouring ranks share one.

On CPUs devices are not scheduled: every actor takes one logical CPU of the local Ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stare_megatron.config import Config
from stare_megatron.errors import UserError
from stare_megatron.host import device


@dataclass(frozen=True)
class Slot:
    """Ray options for one actor, and its rank among the actors of its node (a trainer rank's GPU index)."""

    options: dict[str, Any]
    environment: dict[str, str]
    local_rank: int


@dataclass(frozen=True)
class Placement:
    """A slot for each trainer rank and each engine. `groups` are freed by `release`."""

    trainers: tuple[Slot, ...]
    engines: tuple[Slot, ...]
    groups: tuple[PlacementGroup, ...]

    def release(self) -> None:
        for group in self.groups:
            remove_placement_group(group)


@dataclass(frozen=True)
class _Bundle:
    index: int
    node: str
    gpu: int


@ray.remote(num_cpus=0, num_gpus=1)
def _where() -> tuple[str, int]:
    context = ray.get_runtime_context()
    return context.get_node_id(), int(context.get_accelerator_ids()["GPU"][0])


def actors(config: Config, trainers: int) -> int:
    """Logical CPUs of a local Ray for `trainers` ranks, the engines, the sandbox, and one to spare."""
    pool = config.uses_sandbox and not config.sandbox.url
    sandboxes = math.ceil(config.sandbox.actors * config.sandbox.actor_cpus) if pool else 0
    return trainers + config.inference.engines + sandboxes + 1


def plan(config: Config, *, trainers: bool = True) -> Placement:
    """Reserve devices for a run, or without `trainers` for its engines alone (which are then `separate`).

    Raises:
        UserError: the cluster has too few GPUs, or a colocated engine's ranks would cross a node.
    """
    ranks, engines = config.trainer.world_size if trainers else 0, config.inference.engines
    if device.current() is device.Device.CPU:
        return Placement(
            trainers=tuple(Slot({"num_cpus": 1}, device.trainer_environment(), i) for i in range(ranks)),
            engines=tuple(Slot({"num_cpus": 1}, device.engine_environment(), 0) for _ in range(engines)),
            groups=(),
        )
    if not trainers:
        slots, own = _separate(config)
        return Placement((), slots, (own,))
    return _plan_gpus(config)


def _plan_gpus(config: Config) -> Placement:
    ranks, engines, tp = config.trainer.world_size, config.inference.engines, config.inference.tensor_parallel
    group = _reserve([{"GPU": 1.0, "CPU": 1.0}] * ranks, "PACK", config.cluster.start_timeout, "trainer.world_size")
    bundles = _sorted_bundles(group, ranks)
    local: dict[str, int] = {}
    trainers = []
    for bundle in bundles:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle.index)
        # Ray shows a rank its own GPU only, so its local index is 0.
        trainers.append(Slot({"num_gpus": 1, "scheduling_strategy": strategy}, device.trainer_environment(), 0))
        local[bundle.node] = local.get(bundle.node, 0) + 1
    if config.inference.placement == "separate":
        slots, own = _separate(config)
        return Placement(tuple(trainers), slots, (group, own))
    return Placement(tuple(trainers), tuple(_colocated(group, bundles, e, tp) for e in range(engines)), (group,))


def _separate(config: Config) -> tuple[tuple[Slot, ...], PlacementGroup]:
    """Engines with GPUs of their own."""
    engines, tp = config.inference.engines, config.inference.tensor_parallel
    wanted = [{"GPU": float(tp), "CPU": 1.0}] * engines
    own = _reserve(wanted, "PACK", config.cluster.start_timeout, "inference.engines x inference.tensor_parallel")
    slots = tuple(
        Slot(
            {"num_gpus": tp, "scheduling_strategy": PlacementGroupSchedulingStrategy(own, i)},
            device.engine_environment(),
            0,
        )
        for i in range(engines)
    )
    return slots, own


def _colocated(group: PlacementGroup, bundles: list[_Bundle], engine: int, tp: int) -> Slot:
    mine = bundles[engine * tp : (engine + 1) * tp]
    if len({b.node for b in mine}) != 1:
        raise UserError(
            f"inference.tensor_parallel = {tp}: colocated engine {engine} would span nodes; "
            "choose a value that divides the GPUs of a node"
        )
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=mine[0].index)
    # The trainer's actors own these GPUs in Ray's books; the engine sees them by its environment.
    environment = device.engine_environment() | {
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(str(b.gpu) for b in mine),
    }
    return Slot({"num_gpus": 0, "num_cpus": 0, "scheduling_strategy": strategy}, environment, 0)


def _reserve(bundles: list[dict[str, float]], strategy: str, timeout: float, key: str) -> PlacementGroup:
    group = placement_group(bundles, strategy=strategy)
    if not group.wait(timeout):
        remove_placement_group(group)
        have = ray.cluster_resources().get("GPU", 0)
        raise UserError(f"{key}: {bundles} cannot be placed within {timeout:.0f} s; the cluster has {have:.0f} GPUs")
    return group


def _sorted_bundles(group: PlacementGroup, count: int) -> list[_Bundle]:
    refs = [
        _where.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, i)).remote() for i in range(count)
    ]
    found = [_Bundle(i, node, gpu) for i, (node, gpu) in enumerate(ray.get(refs))]
    return sorted(found, key=lambda b: (b.node, b.gpu))
