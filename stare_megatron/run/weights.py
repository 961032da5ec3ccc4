"""Weights into the engines, and the check that they arrived."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stare_megatron.config import SyncConfig
from stare_megatron.errors import RanksLostError, RunError
from stare_megatron.sync.check import (
    BOUNDS,
    PRECISE,
    compare,
    expected,
    first_difference,
    require_agreement,
    require_own_cache,
    require_same,
)
from stare_megatron.types import Measured

if TYPE_CHECKING:
    import numpy.typing as npt

    from stare_megatron.cluster.engines import EngineGroup
    from stare_megatron.cluster.trainers import Sums, TrainerGroup


NOTHING_DUE = Measured("sync/compared", 0, 0)


class Weights:
    """Pushes the trainer's weights into the engines.

    `dtype`: `model.dtype`; `probe_tokens`: makes the prompt that both are compared on, int32 [n]. `baseline`: the mean
    |log-prob difference| of a pair that was known to have the same weights, nats, kept with the run; 0 before there is
    one, and where `sync.probe_threshold` or float32 needs none. `under_way`: weights change under requests, which may
    leave what the old ones computed in the prefix caches; so many tokens are drawn after, to find it; 0: never.
    `told`: of the checksums compared at the last probe, those that engines could tell.
    """

    def __init__(
        self,
        config: SyncConfig,
        dtype: str,
        trainers: TrainerGroup,
        engines: EngineGroup,
        probe_tokens: Callable[[], npt.NDArray[np.int32]],
        under_way: int = 0,
    ) -> None:
        self._config = config
        self.trainers = trainers
        self._engines = engines
        self._probe_tokens = probe_tokens
        self._dtype = dtype
        self._under_way = under_way
        self._exact = not config.probe_threshold
        self._calibrated = self._exact and dtype != PRECISE
        self._sent: dict[str, str] = {}
        self._compared = False
        self._version = 0
        self.told = NOTHING_DUE
        self.baseline = 0.0
        engines.renew = self.renew

    def push(self, version: int) -> None:
        """Stream the weights of `version` into every engine that there is."""
        sums: Sums = "none"
        if self._exact and self._due(version):
            sums = "share" if self._compared else "all"
        self._sent = push_to_all(self.trainers, self._engines, version, sums)
        self._version = version

    def renew(self, engines: Sequence[int]) -> None:
        """As `renew`, with the weights that were pushed last."""
        renew(self.trainers, self._engines, self._version, engines)

    def score_probe(self, version: int) -> npt.NDArray[np.float32] | None:
        """The trainer's log-probs of the probe prompt, for `probe`, while it has its parameters at hand; None when
        `sync.probe_every` asks for none now."""
        return self.trainers.score_tokens(self._probe_tokens()) if self._due(version) else None

    def probe(self, version: int, ours: npt.NDArray[np.float32] | None) -> float:
        """The largest mean |log-prob difference| between an engine and the trainer on the probe prompt, nats; NaN when
        there is none now. `ours`: what `score_probe` found.

        Raises:
            RunError: it is above the bound, or weights differ and `sync.probe_threshold` is 0; names the engine and the
                first parameter that differs.
        """
        self.told = NOTHING_DUE
        if ours is None:
            return math.nan
        if self._sent:  # exact, where log-probs would not show a small fault
            self._require_same(version, self._sent, self._sent)
            self._compared = True
        tokens = self._probe_tokens()
        found = {i: compare(theirs, ours) for i, theirs in self._engines.logprobs(tokens).items()}
        threshold = self._config.probe_threshold or BOUNDS[self._dtype]
        for i, agreement in found.items():
            require_agreement(f"engine {i}", version, agreement, threshold, lambda i=i: self._difference(i))
        if self._under_way:
            gaps = self._engines.cache_gaps(np.resize(tokens, self._under_way))
            for i, gap in gaps.items():
                require_own_cache(f"engine {i}", version, gap, threshold)
        if not found:  # all of them were lost since the push
            return math.nan
        worst = max(agreement.mean for agreement in found.values())
        if self._calibrated and (not self.baseline or worst > expected(self._dtype, self.baseline)):
            if self.baseline:
                self._require_same(version, self.trainers.checksums())
            self.baseline = worst
        return worst

    def _due(self, version: int) -> bool:
        every = self._config.probe_every
        return bool(every) and version % every == 0

    def _require_same(self, version: int, ours: Mapping[str, str], names: Collection[str] = ()) -> None:
        """Raises: RunError: an engine's checksums, of `names` or all, differ from the trainer's."""
        found = self._engines.checksums(names)
        told = sum(len(ours.keys() & theirs.keys()) for theirs in found.values())
        self.told = Measured("sync/compared", told, len(ours) * len(found))
        for i, theirs in found.items():
            require_same(f"engine {i}", version, first_difference(ours, theirs))

    def _difference(self, engine: int) -> str | None:
        ours = self.trainers.checksums()
        return first_difference(ours, self._engines.checksums().get(engine, ours))


def push_to_all(trainers: TrainerGroup, engines: EngineGroup, version: int, sums: Sums = "none") -> dict[str, str]:
    """Stream the weights of `version` into every engine that there is; what `TrainerGroup.push` returns. When an engine
    is lost meanwhile it is done again with the others.

    Raises:
        EngineLostError: fewer engines than the run wants are left. RunError: as `TrainerGroup.push`, and no engine is
            lost.
    """
    while True:
        sent = _push(trainers, engines, version, engines.awaiting_weights(), sums)
        if sent is not None:
            return sent


def renew(trainers: TrainerGroup, engines: EngineGroup, version: int, chosen: Sequence[int]) -> None:
    """Give engines that were started again, and those alone, the weights of `version`, which the others have; these go
    on sampling. Nothing is done while the ranks are busy, or when they have newer weights: the next push is for all.

    Raises:
        RunError: a rank failed; an engine did, and is still there.
    """
    with trainers.free() as free:
        if free:
            _push(trainers, engines, version, chosen, "none")


def _push(
    trainers: TrainerGroup, engines: EngineGroup, version: int, chosen: Sequence[int], sums: Sums
) -> dict[str, str] | None:
    """What `TrainerGroup.push` returns; None when one of the engines was lost."""
    try:
        sent = trainers.push(version, chosen, sums)
    except RanksLostError:
        raise
    except RunError:
        if engines.any_lost(chosen):
            return None
        raise
    engines.pushed(chosen, version)
    return sent
