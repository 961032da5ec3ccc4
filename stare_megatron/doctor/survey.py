"""Facts of all nodes, gathered through Ray, or of this machine without it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from stare_megatron.cluster import placement, runtime
from stare_megatron.cluster.nodes import Node, Probes, probes
from stare_megatron.config import ClusterConfig, Config
from stare_megatron.doctor import node
from stare_megatron.doctor.facts import Ask, ClusterFacts, NodeFacts, Resources
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.host.ports import connect_error, host_port

_SHORT_S, _FULL_S = 90.0, 180.0  # an actor takes seconds to start, on a crowded machine half a minute


def full(config: Config | None, cluster: ClusterConfig) -> ClusterFacts:
    """Start or join Ray, and ask every node; some seconds, and as long as an import of Transformer Engine takes."""
    with _shared(config.run.dir if config is not None else None) as (folder, nonce, error):
        ask = _ask(config, folder, nonce, full=True)
        # Before Ray, which changes this process's environment.
        facts = _alone(dataclasses.replace(ask, full=False), cluster, error)
        if reason := _no_answer(cluster.address, facts.ray_address):
            return dataclasses.replace(facts, no_answer=reason)
        actors = placement.actors(config, config.trainer.world_size) if config is not None else 1
        try:
            with runtime.cluster(cluster, actors):
                return _everywhere(facts, ask, _FULL_S)
        except UserError as e:
            return dataclasses.replace(facts, refusal=str(e))


def short(config: Config, folder: Path | None) -> ClusterFacts:
    """Of a run that has Ray: without what takes seconds. `folder`: what all nodes must share; None: nothing."""
    with _shared(folder) as (shared, nonce, error):
        ask = _ask(config, shared, nonce, full=False)
        facts = _alone(ask, config.cluster, error)
        if config.cluster.address == "local":
            books = Resources(cpus=facts.driver.cpus, gpus=len(device.gpu_names()))
            return dataclasses.replace(facts, nodes=(dataclasses.replace(facts.driver, ray=books),))
        return _everywhere(facts, ask, _SHORT_S)


def _ask(config: Config | None, shared: Path | None, nonce: str, *, full: bool) -> Ask:
    if config is None:
        return Ask("", "", {}, None, shared, nonce, full)
    model = config.model.path.absolute()
    local = Path(config.checkpoint.local) if config.checkpoint.local and shared is not None else None
    paths = {"model.path": model} | {key: file.absolute() for key, file in config.own_files().items()}
    if config.model.weights:
        paths["model.weights"] = Path(config.model.weights).absolute()
    if config.algorithm.kl.on and config.algorithm.kl.reference:
        paths["algorithm.kl.reference"] = Path(config.algorithm.kl.reference)
    return Ask("", "", {f"{key} = {path}": path for key, path in paths.items()}, model, shared, nonce, full, local)


def _alone(ask: Ask, cluster: ClusterConfig, error: str) -> ClusterFacts:
    """What this machine tells. `error`: why nothing can be written into the shared folder."""
    mine = node.gather(ask if cluster.address == "local" else dataclasses.replace(ask, local=None))
    if error:
        mine = dataclasses.replace(mine, shared_visible=True, shared_error=error)
    sees = device.Device.CUDA.value if device.gpu_names() else device.Device.CPU.value
    forced = os.environ.get("STARE_DEVICE", "")
    chosen = forced if forced in [d.value for d in device.Device] else sees
    shared = str(ask.shared.parent) if ask.shared is not None else ""
    return ClusterFacts(cluster.address, chosen, mine, (), shared, os.environ.get("RAY_ADDRESS", ""))


def _no_answer(address: str, ray_address: str) -> str:
    """Why nothing answers where Ray is to be joined; "" if something does, or Ray itself looks for the place."""
    target = host_port(ray_address if address == "auto" else address)
    return connect_error(target) if target is not None else ""


def _everywhere(facts: ClusterFacts, ask: Ask, timeout: float) -> ClusterFacts:
    with probes() as there:
        asks = {n.id: (dataclasses.replace(ask, id=n.id, address=n.address),) for n in there.nodes.values()}
        found: dict[str, NodeFacts] = there.call(timeout, node.gather, asks)
        clocks = there.clock_offsets()
        blocked = there.blocked(timeout) if len(found) > 1 else []
        same = _same_local(there, ask, timeout) if len(found) > 1 else {}
        members = tuple(
            dataclasses.replace(_member(there.nodes[i], f, clocks.get(i, 0.0), ask), local_with=same.get(i, ()))
            for i, f in found.items()
        )
        silent = {there.nodes[i].name: reason for i, reason in there.silent.items()}
    driver = dataclasses.replace(facts.driver, address=runtime.node_address())
    return dataclasses.replace(facts, driver=driver, nodes=members, silent=silent, blocked=tuple(blocked))


def _same_local(there: Probes, ask: Ask, timeout: float) -> dict[str, tuple[str, ...]]:
    """Of each node, the others that have the same `checkpoint.local`: each leaves a mark there, and looks for more."""
    if ask.local is None:
        return {}
    place = (ask.local, ask.nonce)
    there.call(timeout, node.mark, {i: (*place, i) for i in there.nodes})
    seen: dict[str, list[str]] = there.call(timeout, node.marks, dict.fromkeys(there.nodes, place))
    there.call(timeout, node.unmark, dict.fromkeys(there.nodes, place))
    return {i: tuple(there.nodes[n].name for n in ids if n != i and n in there.nodes) for i, ids in seen.items()}


def _member(known: Node, facts: NodeFacts, clock: float, ask: Ask) -> NodeFacts:
    books = Resources(known.cpus, known.free_cpus, known.gpus, known.free_gpus, known.object_store_bytes)
    error = facts.shared_error
    if ask.shared is not None and facts.shared_visible and not error:
        try:
            seen = (ask.shared / f"done-{known.id}").read_text() == ask.nonce
        except OSError:
            seen = False
        error = "" if seen else "the driver does not see what was renamed there"
    return dataclasses.replace(facts, host=known.host, ray=books, clock=clock, shared_error=error)


@contextlib.contextmanager
def _shared(folder: Path | None) -> Iterator[tuple[Path | None, str, str]]:
    """A folder inside `folder` (made if need be) with a nonce, the nonce, and why that failed; all of it is removed."""
    if folder is None:
        yield None, "", ""
        return
    folder, nonce, error = folder.absolute(), secrets.token_hex(8), ""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    inside = folder / f".doctor-{nonce}"
    try:
        inside.mkdir(parents=True)
        (inside / "nonce").write_text(nonce)
    except OSError as e:
        error = e.strerror or str(e)
    try:
        yield inside, nonce, error
    finally:
        shutil.rmtree(inside, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
