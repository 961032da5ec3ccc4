"""The sending end of the `gloo` transport, on trainer rank 0: without vLLM, whose import takes seconds.

What it sends, and the calls it makes, are what `sync.gloo` in the engines' workers and `WeightPusher`'s client expect.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from stare_megatron.sync import wire
from stare_megatron.sync.source import WeightStream


class Engines(Protocol):
    """The four calls of a push, to all engines."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...


class GlooSender:
    """Joined with every engine's workers.

    Args:
        engines: every call returns when all engines have answered.
        stream: the policy's parameters.
        host: this machine's address as the workers see it.
        world_size: 1 + all workers.
    """

    def __init__(self, engines: Engines, stream: WeightStream, host: str, world_size: int) -> None:
        self._engines = engines
        self._stream = stream
        store = wire.host_store(host)
        worker = {
            "host": host,
            "port": store.port,
            "rank_offset": 1,
            "world_size": world_size,
            "buffer_bytes": wire.BUFFER_BYTES,
        }
        # Both sides block until the group is complete: a worker's error must end the sender's waiting too.
        pool = ThreadPoolExecutor(2)
        joined: Future[Any] = pool.submit(engines.init_weight_transfer_engine, worker)
        group: Future[Any] = pool.submit(wire.GlooGroup, store, 0, world_size)
        pool.shutdown(wait=False)
        for done in wait((joined, group), return_when=FIRST_EXCEPTION).done:
            done.result()
        self._group: wire.GlooGroup = group.result()

    def send_weights(self) -> None:
        """Send all parameters and put them to use."""
        specs = self._stream.specs
        stream = {
            "names": [s.name for s in specs],
            "dtype_names": [str(s.dtype).removeprefix("torch.") for s in specs],
            "shapes": [list(s.shape) for s in specs],
        }
        self._engines.start_weight_update()
        pool = ThreadPoolExecutor(1)
        try:
            received: Future[Any] = pool.submit(self._engines.update_weights, stream)
            wire.send(self._group, specs, self._stream.checked(), wire.BUFFER_BYTES, _raiser(received))
            received.result()
        except BaseException:
            self._group.close()  # the workers must not wait for us
            raise
        finally:
            pool.shutdown(wait=False)
        self._engines.finish_weight_update()


def _raiser(received: Future[Any]) -> Callable[[], None]:
    """Raises the engines' error, once there is one."""

    def check() -> None:
        if received.done():
            received.result()

    return check
