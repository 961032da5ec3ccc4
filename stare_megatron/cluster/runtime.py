"""Start or join Ray, wait for actors with a clear culprit, and always shut down."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions
from ray._private import worker as ray_worker

from stare_megatron.config import ClusterConfig
from stare_megatron.data.tokenizer import first_line
from stare_megatron.errors import RunError, UserError

Ref = ray.ObjectRef
_ENDS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def cluster(config: ClusterConfig, actors: int) -> Iterator[None]:
    """Ray for the length of a run: a local one (`address = "local"`) or an existing cluster.

    `actors`: how many actors the run starts; a local Ray gets that many logical CPUs, since actors here are scheduled
    by count and cap their own threads.

    Raises:
        UserError: the cluster cannot be reached, or a local one cannot start.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if config.address == "local":
            with _deaf_children():
                ray.init(
                    address="local",
                    num_cpus=actors,
                    object_store_memory=config.object_store_mb * 2**20,
                    include_dashboard=False,
                    **common,
                )
        else:
            ray.init(address=config.address, **common)
    except (ConnectionError, RuntimeError, ValueError, OSError) as e:
        raise UserError(f"cluster.address = {config.address!r}: Ray does not answer: {first_line(e)}") from e
    try:
        yield
    finally:
        _shut_down()


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started within, and theirs, hear no SIGTERM or SIGHUP. Schedulers send them to every process of a job,
    and a run can save only while Ray, ranks and engines live. Ray does the same about Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shut_down() -> None:
    """End Ray. What a local one started is deaf to SIGTERM: Ray would give each process a second to hear it, and leaves
    their children to it."""
    node: Any = ray_worker._global_node
    started = [info.process for kind in (node.all_processes if node else {}).values() for info in kind]
    children = [c for p in started if psutil.pid_exists(p.pid) for c in psutil.Process(p.pid).children(recursive=True)]
    for process in started:
        process.terminate = process.kill
    ray.shutdown()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def wait(refs: Sequence[ray.ObjectRef], names: Sequence[str], timeout: float | None = None) -> list[Any]:
    """Results of `refs`, in order. The first failure wins, so that one dead rank never hangs the driver on the others.

    Raises:
        UserError, RunError: raised by the actor; passed on.
        RunError: the actor died, or did not answer within `timeout` seconds; the message names it.
    """
    name_of = dict(zip(refs, names, strict=True))
    pending = list(refs)
    results: dict[ray.ObjectRef, Any] = {}
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=timeout)
        if not done:
            raise RunError(f"{', '.join(name_of[r] for r in pending)}: no answer within {timeout:.0f} s")
        results[done[0]] = get(done[0], name_of[done[0]])
    return [results[r] for r in refs]


def get(ref: ray.ObjectRef, name: str) -> Any:
    """The value of one finished reference, with Ray's wrapping taken off errors."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, UserError | RunError):
            raise type(e.cause)(f"{name}: {e.cause}") from e
        raise
    except ray.exceptions.RayActorError as e:
        raise RunError(f"{name}: its process died: {first_line(e).rstrip('.')}") from e
    except ray.exceptions.OutOfMemoryError as e:
        raise RunError(
            f"{name}: Ray ended its process: {first_line(e)}; run less beside it, or spread the run over more nodes"
        ) from e


def fetch(refs: Sequence[ray.ObjectRef]) -> list[Any]:
    """Bring objects to this process."""
    return ray.get(list(refs))


def enter_actor(folder: Path, name: str) -> None:
    """In an actor's process, first of all: its stdout and stderr, and its children's, go to `folder/name.log`, and it
    stays deaf to SIGTERM: whoever first starts Python's resource tracker would hear it again."""
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_ENDS})
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def node_address() -> str:
    """This node's address, as other nodes reach it."""
    return ray.util.get_node_ip_address()
