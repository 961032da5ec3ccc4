"""Where actors run: a placement group for a run's ranks and engines, and one for the actors that run code, spread over
the nodes. On GPUs one bundle a trainer's GPU and one for each engine with GPUs of its own; on CPUs one logical CPU an
actor. Ranks are sorted by node, so that neighbours share one, and come to the same nodes when a run starts again."""

from __future__ import annotations

import collections
import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stare_megatron.cluster.bundles import Bundle, own_engines, reserved, sandbox, sandbox_cpus
from stare_megatron.cluster.nodes import nodes
from stare_megatron.config import Config
from stare_megatron.errors import RanksLostError, UserError
from stare_megatron.host import device

_ROOM_S = 60
_FREE_S = 10.0  # what an ended run leaves is free within seconds


@dataclass(frozen=True)
class Slot:
    """Ray options for one actor, and its rank among the actors of its node (a trainer rank's GPU index)."""

    options: dict[str, Any]
    environment: dict[str, str]
    local_rank: int


@dataclass(frozen=True)
class Placement:
    """A slot for each trainer rank and each engine; Ray options for each actor that runs code. What `groups` hold (the
    first is that of ranks and engines) is freed by `release`; `gpu_bytes`: memory of the smallest GPU, 0 on CPUs or
    where it is not known."""

    trainers: tuple[Slot, ...]
    engines: tuple[Slot, ...]
    sandboxes: tuple[dict[str, Any], ...]
    groups: tuple[PlacementGroup, ...]
    gpu_bytes: int

    def release(self) -> None:
        for group in self.groups:
            remove_placement_group(group)

    def require(self) -> None:
        """Before something is started again in a slot: a node that is lost takes its slots along, until Ray finds
        others for them.

        Raises:
            RanksLostError: it does not within a minute.
        """
        if not self.groups[0].wait(_ROOM_S):
            free = "; ".join(f"{n.name}: {n.free_gpus or n.free_cpus:g} free" for n in nodes())
            raise RanksLostError(
                f"a node is lost, and the cluster has no room for what the run had there ({free}); start the run again "
                "when there is"
            )


@dataclass(frozen=True)
class _Bundle:
    """`gpu`: as CUDA_VISIBLE_DEVICES names it: an index, or the UUID of a GPU or a MIG instance."""

    index: int
    node: str
    gpu: str
    bytes: int

    def order(self) -> tuple[str, int, str]:
        return self.node, int(self.gpu) if self.gpu.isdigit() else -1, self.gpu


@ray.remote(num_cpus=0, num_gpus=1)
def _where() -> tuple[str, str, int]:
    context = ray.get_runtime_context()
    seen = device.gpus()
    return context.get_node_id(), str(context.get_accelerator_ids()["GPU"][0]), seen[0].bytes if seen else 0


def actors(config: Config, trainers: int) -> int:
    """Logical CPUs of a local Ray for `trainers` ranks, the engines, the sandbox, and one to spare."""
    return trainers + config.inference.engines + sandbox_cpus(config) + 1


def plan(config: Config, *, trainers: bool = True) -> Placement:
    """Reserve devices for a run, or without `trainers` for its engines alone (which are then `separate`), and what runs
    its code: all or nothing, so that two runs never hold for long what the other waits for.

    Raises:
        UserError: the cluster has too few, or too few free; or ranks that split layers would cross a node.
    """
    ranks = config.trainer.world_size if trainers else 0
    gpus = device.current() is device.Device.CUDA
    with contextlib.ExitStack() as stack:
        # On CPUs ranks and engines alike over the nodes.
        group = _reserve(
            reserved(config, gpus=gpus, trainers=trainers),
            "PACK" if gpus else "SPREAD",
            "trainer.world_size, inference.engines x inference.tensor_parallel",
        )
        stack.callback(remove_placement_group, group)
        slots, gpu_bytes = (
            _on_gpus(config, group, ranks, own_engines(config, trainers=trainers))
            if gpus
            else (_on_cpus(config, group, ranks), 0)
        )
        groups, boxes = [group], sandbox(config)
        if any(boxes):
            groups.append(_reserve(boxes, "SPREAD", "sandbox.actors x sandbox.actor_cpus, sandbox.node_resource"))
            stack.callback(remove_placement_group, groups[-1])
        stack.pop_all()  # nothing was found wrong: they stay
    options = tuple(_box(bundle, groups[-1], k) for k, bundle in enumerate(boxes))
    return Placement(slots[:ranks], slots[ranks:], options, tuple(groups), gpu_bytes)


def _on_cpus(config: Config, group: PlacementGroup, ranks: int) -> tuple[Slot, ...]:
    """Those of ranks, by node as on GPUs, then those of engines."""
    node_of = placement_group_table(group)["bundles_to_node_id"]
    bundles = [*sorted(range(ranks), key=lambda k: (node_of[k], k)), *range(ranks, ranks + config.inference.engines)]
    trainers = [(device.trainer_environment(), rank) for rank in range(ranks)]
    engines = [(device.engine_environment(), 0)] * config.inference.engines
    return tuple(
        Slot({"num_cpus": 1, "scheduling_strategy": _strategy(group, k)}, environment, local)
        for k, (environment, local) in zip(bundles, trainers + engines, strict=True)
    )


def _on_gpus(config: Config, group: PlacementGroup, ranks: int, own: int) -> tuple[tuple[Slot, ...], int]:
    """Those of ranks, then those of engines; memory of the smallest GPU. `own`: engines with GPUs of their own, whose
    bundles follow those of the ranks."""
    i = config.inference
    bundles = _sorted_bundles(group, ranks)
    _check_one_node(bundles, config.trainer.tensor_parallel, "trainer.tensor_parallel", "ranks that split layers")
    # Ray shows a rank its own GPU only, so its local index is 0.
    trainers = [
        Slot({"num_gpus": 1, "scheduling_strategy": _strategy(group, b.index)}, device.trainer_environment(), 0)
        for b in bundles
    ]
    if own:
        engines = [
            Slot(
                {"num_gpus": i.tensor_parallel, "scheduling_strategy": _strategy(group, ranks + k)},
                device.engine_environment(),
                0,
            )
            for k in range(own)
        ]
    else:
        used = bundles[: i.engines * i.tensor_parallel]
        _check_one_node(used, i.tensor_parallel, "inference.tensor_parallel", "the GPUs of a colocated engine")
        engines = [_colocated(group, used[k : k + i.tensor_parallel]) for k in range(0, len(used), i.tensor_parallel)]
    return (*trainers, *engines), min((b.bytes for b in bundles), default=0)


def _box(bundle: Bundle, group: PlacementGroup, index: int) -> dict[str, Any]:
    """Options of an actor that runs code; one for which nothing is reserved runs on any node."""
    return {
        "num_cpus": bundle.get("CPU", 0.0),
        "resources": {kind: n for kind, n in bundle.items() if kind != "CPU"},
        "scheduling_strategy": _strategy(group, index) if bundle else "SPREAD",
    }


def _check_one_node(bundles: list[_Bundle], size: int, key: str, what: str) -> None:
    """Raises: UserError: consecutive bundles, `size` at a time, are not all of one node."""
    for first in range(0, len(bundles), size):
        nodes = [b.node for b in bundles[first : first + size]]
        if len(set(nodes)) > 1:
            counts = collections.Counter(b.node for b in bundles)
            raise UserError(
                f"{key} = {size}: {what}, {first} to {first + len(nodes) - 1}, would span nodes, of which the run gets "
                f"{', '.join(str(n) for n in counts.values())} GPUs; choose a value that divides these, or free whole "
                "nodes"
            )


def _strategy(group: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


def _colocated(group: PlacementGroup, mine: list[_Bundle]) -> Slot:
    # The trainer's actors own these GPUs in Ray's books; the engine sees them by its environment.
    environment = device.engine_environment() | {
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(b.gpu for b in mine),
    }
    options = {"num_gpus": 0, "num_cpus": 0, "scheduling_strategy": _strategy(group, mine[0].index)}
    return Slot(options, environment, 0)


def _reserve(bundles: list[Bundle], strategy: str, keys: str) -> PlacementGroup:
    """`keys`: of the settings that ask for them.

    Raises:
        UserError: there are too few, or not free within ten seconds; nothing is held then.
    """
    need = sum((collections.Counter(b) for b in bundles), collections.Counter[str]())
    group = placement_group(bundles, strategy=strategy)
    have = ray.cluster_resources()
    for kind in need.keys() - have.keys() - {"CPU", "GPU"}:
        remove_placement_group(group)
        raise UserError(
            f"sandbox.node_resource = {kind!r}: no node has it; start Ray on those that may run code with "
            f"--resources='{{\"{kind}\": 1}}', or leave it empty"
        )
    enough = all(have.get(kind, 0) >= n for kind, n in need.items())
    if enough and group.wait(_FREE_S):
        return group
    remove_placement_group(group)
    kind = "GPUs" if "GPU" in need else "CPUs"
    counts = [(n.name, n.gpus, n.free_gpus) if kind == "GPUs" else (n.name, n.cpus, n.free_cpus) for n in nodes()]
    wanted = ", ".join(f"{need[name]:g} {name}s" for name in ("GPU", "CPU") if name in need)
    in_all, free = sum(n for _, n, _ in counts), sum(n for *_, n in counts)
    where = "; ".join(f"{name}: {total:g}, {free:g} free" for name, total, free in counts)
    raise UserError(
        f"the run needs {wanted} ({keys}); the cluster has {in_all:g} {kind}, {free:g} free ({where}); end what holds "
        "them, lower the numbers, or add nodes"
    )


def _sorted_bundles(group: PlacementGroup, count: int) -> list[_Bundle]:
    refs = [_where.options(scheduling_strategy=_strategy(group, i)).remote() for i in range(count)]
    return sorted((_Bundle(i, *found) for i, found in enumerate(ray.get(refs))), key=_Bundle.order)
