"""The machines of the cluster that Ray has started or joined, and functions called on each of them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stare_megatron.cluster.runtime import cause
from stare_megatron.host.ports import connect_error, free_port

_CLOCK_S = 5.0
_NOTICE_S = 20.0  # Ray notices the loss of a node some seconds after who calls there
_AT_ONCE = 32  # connections a node tries at a time


@dataclass(frozen=True)
class Node:
    """A live node as Ray knows it: logical CPUs and GPUs, in all and free; bytes of its object store."""

    id: str
    host: str
    address: str
    cpus: float
    free_cpus: float
    gpus: float
    free_gpus: float
    object_store_bytes: int

    @property
    def name(self) -> str:
        return f"{self.host} ({self.address})"


def nodes() -> tuple[Node, ...]:
    """All live ones, by address."""
    free = available_resources_per_node()
    found = []
    for n in ray.nodes():
        if not n["Alive"]:
            continue
        have, left = n["Resources"], free.get(n["NodeID"], {})
        cpus, gpus = ((have.get(kind, 0.0), left.get(kind, 0.0)) for kind in ("CPU", "GPU"))
        store = int(have.get("object_store_memory", 0))
        found.append(Node(n["NodeID"], n["NodeManagerHostname"], n["NodeManagerAddress"], *cpus, *gpus, store))
    return tuple(sorted(found, key=lambda node: node.address))


@ray.remote(num_cpus=0)
class _Probe:
    def __init__(self) -> None:
        self._listening: list[socket.socket] = []

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return function(*arguments)

    def clock(self) -> float:
        return time.time()

    def listen(self) -> tuple[int, ...]:
        """A port for rendezvous points, and one of those that systems give out."""
        for port in (free_port(), 0):
            s = socket.socket()
            self._listening.append(s)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as `free_port` asks
            s.bind(("", port))
            s.listen(1024)  # the kernel answers; nobody accepts
        return tuple(s.getsockname()[1] for s in self._listening)

    def reach(self, targets: Sequence[tuple[str, int]]) -> list[str]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(connect_error, targets))


@dataclass(frozen=True)
class Blocked:
    """Ports of a node to which another has no way."""

    source: str
    target: str
    ports: tuple[int, ...]
    reason: str


class Probes:
    """An actor on each node; it takes no CPU and no GPU. One that fails or is late is left out from then on, with the
    reason in `silent`, by the node's id; a node that Ray loses meanwhile is of the cluster no more: it is in `lost`."""

    def __init__(self, there: Iterable[Node]) -> None:
        self.nodes = {node.id: node for node in there}
        self.silent: dict[str, str] = {}
        self.lost: set[str] = set()
        self._actors: dict[str, Any] = {
            node: _Probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in self.nodes
        }

    def call(
        self, timeout: float, function: Callable[..., Any], arguments: dict[str, tuple[Any, ...]]
    ) -> dict[str, Any]:
        """What a function of this package returns on each node, by its id, of `arguments` by id. `timeout`: seconds."""
        return self._ask(timeout, {n: a.call.remote(function, arguments[n]) for n, a in self._answering()})

    def clock_offsets(self) -> dict[str, float]:
        """Seconds by which each node's clock is ahead of this one's at least: 0 within what the answer took."""
        found = {}
        for node, actor in self._answering():
            before = time.time()
            for there in self._ask(_CLOCK_S, {node: actor.clock.remote()}).values():
                half = (time.time() - before) / 2
                off = there - before - half
                found[node] = 0.0 if abs(off) <= half else off - half if off > 0 else off + half
        return found

    def blocked(self, timeout: float) -> list[Blocked]:
        """Ways between two nodes that are closed; each node listens and all others connect."""
        ports = self._ask(timeout, {n: a.listen.remote() for n, a in self._answering()})
        targets = [(node, port) for node, mine in ports.items() for port in mine]
        others = {n: [(t, p) for t, p in targets if t != n] for n in ports}
        tried = self._ask(
            timeout,
            {n: a.reach.remote([(self.nodes[t].address, p) for t, p in others[n]]) for n, a in self._answering()},
        )
        closed: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for node, reasons in tried.items():
            for (target, port), reason in zip(others[node], reasons, strict=True):
                if reason:
                    closed.setdefault((node, target), []).append((port, reason))
        return [
            Blocked(self.nodes[n].name, self.nodes[t].name, tuple(p for p, _ in found), found[0][1])
            for (n, t), found in closed.items()
        ]

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def _answering(self) -> Iterator[tuple[str, Any]]:
        return ((node, actor) for node, actor in self._actors.items() if node not in self.silent.keys() | self.lost)

    def _ask(self, timeout: float, refs: dict[str, ray.ObjectRef]) -> dict[str, Any]:
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout)
        found = {}
        for node, ref in refs.items():
            try:
                found[node] = ray.get(ref, timeout=0)
            except ray.exceptions.GetTimeoutError:
                self.silent[node] = f"no answer within {timeout:.0f} s"
            except ray.exceptions.RayError as e:
                died = isinstance(e, ray.exceptions.RayActorError) and not e.actor_init_failed
                if died and _is_lost(node):
                    self.lost.add(node)
                else:
                    self.silent[node] = cause(e) or type(e).__name__
        return found


def _is_lost(node: str) -> bool:
    """Whether Ray loses it within seconds."""
    deadline = time.monotonic() + _NOTICE_S
    while any(there.id == node for there in nodes()):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


@contextlib.contextmanager
def probes() -> Iterator[Probes]:
    """Of all live nodes."""
    found = Probes(nodes())
    try:
        yield found
    finally:
        found.close()
