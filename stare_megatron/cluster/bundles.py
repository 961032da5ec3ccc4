"""What a run asks Ray for, and how many nodes have it. Without ray: `launch` counts before there is a cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from stare_megatron.config import Config
from stare_megatron.errors import UserError

Bundle = dict[str, float]

_SHARE = 1e-3  # of a node's resource, which only marks it


def own_engines(config: Config, *, trainers: bool = True) -> int:
    """Engines with GPUs of their own."""
    i = config.inference
    return i.engines if i.placement == "separate" or not trainers else 0


def reserved(config: Config, *, gpus: bool, trainers: bool = True) -> list[Bundle]:
    """One bundle a rank, then those of engines; without `trainers` of engines alone. On CPUs one an actor."""
    ranks, i = config.trainer.world_size if trainers else 0, config.inference
    if not gpus:
        return [{"CPU": 1.0}] * (ranks + i.engines)
    engine = {"GPU": float(i.tensor_parallel), "CPU": 1.0}
    return [{"GPU": 1.0, "CPU": 1.0}] * ranks + [engine] * own_engines(config, trainers=trainers)


def sandbox(config: Config) -> list[Bundle]:
    """One for each actor that runs code; an empty one reserves nothing."""
    s = config.sandbox
    if not config.uses_sandbox or s.url:
        return []
    asked = {"CPU": s.actor_cpus} | ({s.node_resource: _SHARE} if s.node_resource else {})
    return [{kind: n for kind, n in asked.items() if n}] * s.actors


def sandbox_cpus(config: Config) -> int:
    """Of all these actors, rounded up."""
    return math.ceil(sum(bundle.get("CPU", 0.0) for bundle in sandbox(config)))


def nodes_needed(bundles: Sequence[Mapping[str, float]], node: Mapping[str, float]) -> int:
    """Equal nodes that hold the bundles, each put on the first with room. `node`: what one has; a resource that it does
    not name is not counted.

    Raises:
        UserError: a bundle is larger than a node.
    """
    left: list[dict[str, float]] = []
    for bundle in bundles:
        asked = {kind: n for kind, n in bundle.items() if kind in node}
        place = next((free for free in left if all(free[kind] >= n for kind, n in asked.items())), None)
        if place is None:
            if over := [f"{n:g} {kind}s" for kind, n in asked.items() if n > node[kind]]:
                has = ", ".join(f"{n:g} {kind}s" for kind, n in node.items() if n < math.inf)
                raise UserError(
                    f"{', '.join(over)} must be on one node, which has {has}; lower inference.tensor_parallel or "
                    "sandbox.actor_cpus, or name larger nodes"
                )
            place = dict(node)
            left.append(place)
        for kind, n in asked.items():
            place[kind] -= n
    return len(left)
