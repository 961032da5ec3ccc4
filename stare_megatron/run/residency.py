"""Who has the devices: colocated engines and trainer ranks take turns on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stare_megatron.cluster.engines import EngineGroup


class Residency:
    """Hands the devices back and forth. `shared`: engines and trainer have the same ones; else nobody ever waits."""

    def __init__(self, engines: EngineGroup, *, shared: bool) -> None:
        self._engines = engines
        self._shared = shared
        self._asleep = False

    def to_trainer(self) -> None:
        """The engines sleep; the trainer may use all memory."""
        if self._shared and not self._asleep:
            self._engines.sleep()
            self._asleep = True

    @contextlib.contextmanager
    def to_engines(self) -> Iterator[None]:
        """The engines wake: before the context with room for weights alone, so that those of the trainer and theirs are
        all that is in memory while they are pushed; after it with their KV cache."""
        if self._asleep:
            self._engines.wake("weights")
        yield
        if self._asleep:
            self._engines.wake("kv_cache")
            self._asleep = False
