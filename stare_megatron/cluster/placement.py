"""Where actors run: a placement group for a run's ranks and engines, and one for the actors that run code, spread over
the nodes. On GPUs one bundle a trainer's GPU and one for each engine with GPUs of its own; on CPUs one logical CPU an
actor. Ranks are sorted by node, so that neighbours share one, and come to the same nodes when a run starts again."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stare_megatron.cluster.bundles import Bundle, reserved, sandbox, sandbox_cpus
from stare_megatron.cluster.nodes import nodes
from stare_megatron.config import Config
from stare_megatron.errors import RanksLostError, UserError
from stare_megatron.host import device

_ROOM_S = 60
_ITS_CODE = ", its code"  # in the name of the reservation for a run's code, after the run's
_FREE_S = 10.0  # what an ended run leaves is free within seconds


@dataclass(frozen=True)
class Slot:
    """Ray options for one actor, and its rank among the actors of its node (a trainer rank's GPU index). `bundle`: of
    the placement group, which it is in. Slots are equal that see the same."""

    options: dict[str, Any] = field(compare=False)
    environment: dict[str, str]
    local_rank: int
    bundle: int


@dataclass(frozen=True)
class Found:
    """A rank's bundle, and where it is. `gpu`: as CUDA_VISIBLE_DEVICES names it: an index, or the UUID of a GPU or a
    MIG instance."""

    index: int
    node: str
    gpu: str
    bytes: int

    def order(self) -> tuple[str, int, str]:
        return self.node, int(self.gpu) if self.gpu.isdigit() else -1, self.gpu


@dataclass(frozen=True)
class Placement:
    """A slot for each trainer rank and each engine; Ray options for each actor that runs code. What `groups` hold (the
    first is that of ranks and engines) is freed by `release`; `found`: the ranks' bundles, a rank each; `gpu_bytes`:
    memory of the smallest GPU, 0 on CPUs or where it is not known."""

    config: Config
    trainers: tuple[Slot, ...]
    engines: tuple[Slot, ...]
    sandboxes: tuple[dict[str, Any], ...]
    groups: tuple[PlacementGroup, ...]
    found: tuple[Found, ...]
    gpu_bytes: int

    def release(self) -> None:
        for group in self.groups:
            remove_placement_group(group)

    def renewed(self) -> Placement:
        """Before ranks are started again: a lost node takes slots along, for which Ray finds others. The ranks are
        gone, engines may run.

        Raises:
            RanksLostError: it does not within a minute, or ranks that split layers, or the GPUs of an engine, would
                be on two nodes then.
        """
        group = self.groups[0]
        # Ray notices the loss of a node after some seconds, and would start an actor there before: what runs a task now
        # is there.
        asked = [_answers.options(scheduling_strategy=_strategy(group, k)).remote() for k in range(group.bundle_count)]
        if len(ray.wait(asked, num_returns=len(asked), timeout=_ROOM_S)[0]) < len(asked):
            free = "; ".join(f"{n.name}: {n.free_gpus or n.free_cpus:g} free" for n in nodes())
            raise RanksLostError(
                f"a node is lost, and the cluster has no room for what the run had there ({free}); start the run again "
                "when there is"
            )
        node_of = _node_of(group)
        if all(node_of[b.index] == b.node for b in self.found):
            return self
        try:
            found = tuple(in_place(self.found, _find(group, len(self.found), _ROOM_S)))
            trainers, engines = _slots(self.config, group, found, len(self.engines))
        except ray.exceptions.GetTimeoutError as e:
            raise RanksLostError(f"a node is lost, and what was found for it does not start within {_ROOM_S} s") from e
        except UserError as e:
            raise RanksLostError(f"a node is lost, and what was found for it does not do: {e}") from e
        return dataclasses.replace(self, trainers=trainers, engines=engines, found=found)


def in_place(before: Sequence[Found], now: Sequence[Found]) -> list[Found]:
    """Bundles that did not move keep their places, and with them the ranks and engines there theirs; those that moved
    share the other places, in the order of nodes. `now`: of the same bundles, in any order."""
    at = {b.index: b for b in now}
    moved = iter(sorted((at[b.index] for b in before if at[b.index] != b), key=Found.order))
    return [b if at[b.index] == b else next(moved) for b in before]


@ray.remote(num_cpus=0, max_retries=-1)
def _answers() -> None:
    """Anywhere."""


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
            str(config.folder.absolute()),
        )
        stack.callback(remove_placement_group, group)
        found = tuple(sorted(_find(group, ranks), key=Found.order))
        slots = _slots(config, group, found, config.inference.engines)
        groups, boxes = [group], sandbox(config)
        if any(boxes):
            keys = "sandbox.actors x sandbox.actor_cpus, sandbox.node_resource"
            groups.append(_reserve(boxes, "SPREAD", keys, f"{config.folder.absolute()}{_ITS_CODE}"))
            stack.callback(remove_placement_group, groups[-1])
        stack.pop_all()  # nothing was found wrong: they stay
    options = tuple(_box(bundle, groups[-1], k) for k, bundle in enumerate(boxes))
    gpu_bytes = min((b.bytes for b in found), default=0)
    return Placement(config, *slots, options, tuple(groups), found, gpu_bytes)


def _slots(
    config: Config, group: PlacementGroup, found: Sequence[Found], engines: int
) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """Those of ranks, which have the bundles `found` in this order, and those of engines.

    Raises:
        UserError: ranks that split layers, or the GPUs of an engine, would be on two nodes.
    """
    on_gpus = device.current() is device.Device.CUDA
    if on_gpus:
        _check_one_node(found, config.trainer.tensor_parallel, "trainer.tensor_parallel", "ranks that split layers")
    # Ray shows a rank its own GPU only, so its local index is 0.
    need, environment = {"num_gpus" if on_gpus else "num_cpus": 1}, device.trainer_environment()
    trainers = tuple(_slot(group, b.index, need, environment, 0 if on_gpus else rank) for rank, b in enumerate(found))
    tensor_parallel, environment = config.inference.tensor_parallel, device.engine_environment()
    if on_gpus and config.inference.placement == "colocated" and found:
        used = found[: engines * tensor_parallel]
        _check_one_node(used, tensor_parallel, "inference.tensor_parallel", "the GPUs of a colocated engine")
        return trainers, tuple(
            _colocated(group, used[k : k + tensor_parallel]) for k in range(0, len(used), tensor_parallel)
        )
    need = {"num_gpus": tensor_parallel} if on_gpus else {"num_cpus": 1}
    own = range(len(found), len(found) + engines)
    return trainers, tuple(_slot(group, k, need, environment, 0) for k in own)


def _box(bundle: Bundle, group: PlacementGroup, index: int) -> dict[str, Any]:
    """Options of an actor that runs code; one for which nothing is reserved runs on any node."""
    return {
        "num_cpus": bundle.get("CPU", 0.0),
        "resources": {kind: n for kind, n in bundle.items() if kind != "CPU"},
        "scheduling_strategy": _strategy(group, index) if bundle else "SPREAD",
    }


def _check_one_node(bundles: Sequence[Found], size: int, key: str, what: str) -> None:
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


def _slot(
    group: PlacementGroup, bundle: int, need: Mapping[str, int], environment: dict[str, str], local_rank: int
) -> Slot:
    return Slot({**need, "scheduling_strategy": _strategy(group, bundle)}, environment, local_rank, bundle)


def _colocated(group: PlacementGroup, mine: Sequence[Found]) -> Slot:
    # The trainer's actors own these GPUs in Ray's books; the engine sees them by its environment.
    environment = device.engine_environment() | {
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(b.gpu for b in mine),
    }
    return _slot(group, mine[0].index, {"num_gpus": 0, "num_cpus": 0}, environment, 0)


def _reserve(bundles: list[Bundle], strategy: str, keys: str, name: str) -> PlacementGroup:
    """`keys`: of the settings that ask for them; `name`: how others are told who has them.

    Raises:
        UserError: there are too few, or not free within ten seconds; nothing is held then.
    """
    need = sum((collections.Counter(b) for b in bundles), collections.Counter[str]())
    group = placement_group(bundles, strategy=strategy, name=name)
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
    where = "; ".join(f"{node}: {total:g}, {free:g} free" for node, total, free in counts) + _holders(kind, name)
    raise UserError(
        f"the run needs {wanted} ({keys}); the cluster has {in_all:g} {kind}, {free:g} free ({where}); end what holds "
        "them, lower the numbers, or add nodes"
    )


def _holders(kind: str, mine: str) -> str:
    """Other runs than that of the reservation `mine`, by their folders, and what they have reserved."""
    mine = mine.removesuffix(_ITS_CODE)
    table = placement_group_table().values()
    groups = [
        one for one in table if one["state"] == "CREATED" and one["name"].removesuffix(_ITS_CODE) not in ("", mine)
    ]
    have = ((one["name"], sum(bundle.get(kind[:-1], 0) for bundle in one["bundles"].values())) for one in groups)
    return "".join(f"; {name} has {count:g} {kind}" for name, count in have if count)


def _node_of(group: PlacementGroup) -> Mapping[int, str]:
    return placement_group_table(group)["bundles_to_node_id"]


def _find(group: PlacementGroup, count: int, timeout: float | None = None) -> list[Found]:
    """Where its first bundles are, on GPUs by a task in each, for which it waits `timeout` seconds."""
    if device.current() is not device.Device.CUDA:
        node_of = _node_of(group)
        return [Found(i, node_of[i], "", 0) for i in range(count)]
    refs = [_where.options(scheduling_strategy=_strategy(group, i)).remote() for i in range(count)]
    return [Found(i, *where) for i, where in enumerate(ray.get(refs, timeout=timeout))]
