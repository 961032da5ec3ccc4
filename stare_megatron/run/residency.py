"""Who has the devices: colocated engines and trainer ranks take turns on them.

With `trainer.offload` a rank gives its memory up as an engine does, in the order that keeps the peak lowest:

    to_trainer   engines sleep -> parameters come back (gradients and optimizer state when the update wants them)
    to_engines   engines' weights wake -> push, score the probe -> parameters leave -> KV caches wake

An update gives gradients and optimizer state up by itself, so that only parameters and the engines' weights are in
memory during a push.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from stare_megatron.config.trainer import StateClass
from stare_megatron.errors import RunError

if TYPE_CHECKING:
    from stare_megatron.cluster.engines import EngineGroup
    from stare_megatron.cluster.trainers import TrainerGroup

_RESCUE_SECONDS = 60.0  # for engines to sleep when the run has ended: one of them may be why


class Residency:
    """Hands the devices back and forth. `shared`: engines and trainer have the same ones; else nobody ever waits.

    `offload`: `trainer.offload`; `asleep`: the engines sleep already. A context around the loop: when an error ends it,
    engines sleep before the ranks save what they hold.
    """

    def __init__(
        self,
        engines: EngineGroup,
        trainers: TrainerGroup,
        *,
        shared: bool,
        offload: Collection[StateClass],
        asleep: bool = False,
    ) -> None:
        self._engines = engines
        self._trainers = trainers
        self._shared = shared
        self._offload = frozenset(offload)
        self._asleep = asleep

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self._saving_needs_room and not self._asleep:
            with contextlib.suppress(RunError):  # a dead engine holds nothing
                self._engines.sleep(_RESCUE_SECONDS)
                self._asleep = True

    @property
    def engines_sleep(self) -> bool:
        return self._asleep

    @property
    def saves_first(self) -> bool:
        """Whether a save now, while the ranks have what they save at hand or next to it, spares engines that would have
        to sleep for it after the push."""
        return self._saving_needs_room and self._asleep

    def to_trainer(self) -> None:
        """The engines sleep; the trainer may use all memory.

        Raises:
            RunError: an engine failed, or parameters find no room.
        """
        if self._shared and not self._asleep:
            self._engines.sleep()
            self._asleep = True
            if "parameters" in self._offload:
                self._trainers.to_device()

    def to_checkpoint(self) -> None:
        """Before ranks load or save a checkpoint or export the policy: the engines sleep if what is away must come back
        for it. They have no weights then: `to_engines` with a push must follow before anybody samples.

        Raises:
            RunError: as `to_trainer`.
        """
        if self._saving_needs_room:
            self.to_trainer()

    @contextlib.contextmanager
    def to_engines(self) -> Iterator[None]:
        """The engines wake: before the context with room for weights alone, so that those of the trainer and theirs are
        all that is in memory while they are pushed; after it, when the trainer's are away, with their KV cache.

        Raises:
            RunError: an engine failed, or a rank holds more than it should.
        """
        if self._asleep:
            self._engines.wake("weights")
        yield
        if self._offload:
            self._trainers.to_host()
        if self._asleep:
            self._engines.wake("kv_cache")
            self._asleep = False

    @property
    def _saving_needs_room(self) -> bool:
        return self._shared and bool(self._offload & {"parameters", "optimizer"})
