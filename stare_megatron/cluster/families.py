"""Processes with those they have started, wherever in the cluster they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stare_megatron.host import processes


@dataclass(frozen=True)
class Family:
    """A process and those it has started, by process id and time of creation, on the node that Ray knows by `node`."""

    node: str
    members: tuple[tuple[int, float], ...]


def family() -> Family:
    """Of this process."""
    me = psutil.Process()
    found = []
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append((process.pid, process.create_time()))
    return Family(ray.get_runtime_context().get_node_id(), tuple(found))


def end(gone: Family) -> ray.ObjectRef:
    """Kill what is left of a family, and all that it has started since, stopped or not: of a process that is killed,
    children that are stopped stay."""
    return _end.options(scheduling_strategy=NodeAffinitySchedulingStrategy(gone.node, soft=False)).remote(gone)


def stopped(family: Family) -> ray.ObjectRef:
    """Which process of a family a signal or a debugger has stopped; 0: none."""
    there = NodeAffinitySchedulingStrategy(family.node, soft=False)
    return _stopped.options(scheduling_strategy=there).remote(family)


@ray.remote(num_cpus=0, max_retries=0)
def _end(gone: Family) -> None:
    processes.end(processes.under(process.pid for process in _there(gone)), 0.0)


@ray.remote(num_cpus=0, max_retries=0)
def _stopped(family: Family) -> int:
    for process in _there(family):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                return process.pid
    return 0


def _there(family: Family) -> Iterator[psutil.Process]:
    """Those that live; not another process that has got the id of one."""
    for number, created in family.members:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(number)
            if abs(process.create_time() - created) < 1.0:
                yield process
