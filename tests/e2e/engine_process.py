"""An `Engine` in a process of its own, started with the environment that engines need, driven by blocking calls."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from stare_megatron.config import InferenceConfig
from stare_megatron.host import device
from stare_megatron.inference.engine import Engine


class EngineProcess:
    """`call("sample", ...)` runs Engine.sample there; `submit` gives a future, so calls can overlap.

    `own_core`: vLLM's core is in a process beside it, as on GPUs. `answered`: the futures in the order of the answers.
    """

    def __init__(self, *args: Any, own_core: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, args))
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if own_core else {}
        with _environment(device.engine_environment() | more):
            self.process.start()
        theirs.close()
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self.answered: list[Future[Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def submit(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._ids)
            self._waiting[number] = future
            self._pipe.send((number, method, args))
        return future

    def call(self, method: str, *args: Any, timeout: float = 400) -> Any:
        return self.submit(method, *args).result(timeout)

    def descendants(self) -> list[psutil.Process]:
        """All processes the engine's process started, resource trackers apart."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [p for p in children if "resource_tracker" not in " ".join(p.cmdline())]

    def stop(self) -> None:
        """Close the engine and end its process."""
        left = self.descendants()
        if self.process.is_alive():
            self._pipe.send(None)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
        for process in left:
            if process.is_running():
                process.kill()

    def _read(self) -> None:
        try:
            while True:
                number, failed, value = self._pipe.recv()
                future = self._waiting.pop(number)
                self.answered.append(future)
                future.set_exception(value) if failed else future.set_result(value)
        except (EOFError, OSError):
            for future in self._waiting.values():
                future.set_exception(EOFError("the engine's process has ended"))


@contextmanager
def started(folder: Path, config: InferenceConfig, window: int, timeout: float = 400) -> Iterator[EngineProcess]:
    """A float32 engine of a checkpoint that has started in so many seconds; it is stopped afterwards."""
    process = EngineProcess("engine 0", folder, "float32", config, window, 0, "gloo")
    try:
        process.call("start", timeout=timeout)
        yield process
    finally:
        process.stop()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """A spawned process gets the parent's environment, LD_PRELOAD included, at its start."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, args: tuple[Any, ...]) -> None:
    asyncio.run(_loop(pipe, Engine(*args)))


async def _loop(pipe: Connection, engine: Engine) -> None:
    tasks = set()

    async def run(number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            result = getattr(engine, method)(*args)
            reply = number, False, await result if asyncio.iscoroutine(result) else result
        except Exception as e:  # noqa: BLE001 - goes to the caller
            reply = number, True, e
        pipe.send(reply)

    try:
        while (order := await asyncio.to_thread(_receive, pipe)) is not None:
            task = asyncio.create_task(run(*order))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    finally:
        await engine.close()


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None
