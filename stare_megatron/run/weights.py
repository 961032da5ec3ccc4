"""Weights into the engines, and the check that they arrived."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from stare_megatron.config import SyncConfig
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

if TYPE_CHECKING:
    import numpy.typing as npt

    from stare_megatron.cluster.engines import EngineGroup
    from stare_megatron.cluster.trainers import Sums, TrainerGroup


class Weights:
    """Pushes the trainer's weights into the engines.

    `dtype`: `model.dtype`; `probe_tokens`: makes the prompt that both are compared on, int32 [n]. `baseline`: the mean
    |log-prob difference| of a pair that was known to have the same weights, nats, kept with the run; 0 before there is
    one, and where `sync.probe_threshold` or float32 needs none. `under_way`: weights change under requests, which may
    leave what the old ones computed in the prefix caches; so many tokens are drawn after, to find it; 0: never.
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
        self._calibrated = dtype != PRECISE and not config.probe_threshold
        self._sent: dict[str, str] = {}
        self._compared = False
        self.baseline = 0.0

    def push(self, version: int) -> None:
        """Stream the weights of `version` into every engine."""
        sums: Sums = "none"
        if self._calibrated and self._due(version):
            sums = "share" if self._compared else "all"
        self._sent = self.trainers.push(version, sums)

    def admit(self, engine: int, version: int) -> None:
        """Let an engine that comes late, or again, join, and give it alone the weights of `version`: those that the
        ranks have. The other engines go on sampling.

        Raises:
            RunError: it does not come, or pushes are not sharded.
        """
        self.trainers.join([engine])
        self.trainers.push(version, engines=[engine])

    def score_probe(self, version: int) -> npt.NDArray[np.float32] | None:
        """The trainer's log-probs of the probe prompt, for `probe`, while it has its parameters at hand; None when
        `sync.probe_every` asks for none now."""
        return self.trainers.score_tokens(self._probe_tokens()) if self._due(version) else None

    def probe(self, version: int, ours: npt.NDArray[np.float32] | None) -> float:
        """The largest mean |log-prob difference| between an engine and the trainer on the probe prompt, nats; NaN when
        there is none now. `ours`: what `score_probe` found.

        Raises:
            RunError: it is above `sync.probe_threshold`, or, in low precision, weights differ; names the engine and the
                first parameter that differs.
        """
        if ours is None:
            return math.nan
        if self._sent:  # exact, where log-probs would not show a small fault
            self._require_same(version, self._sent, self._sent)
            self._compared = True
        tokens = self._probe_tokens()
        found = [compare(theirs, ours) for theirs in self._engines.logprobs(tokens)]
        threshold = self._config.probe_threshold or BOUNDS[self._dtype]
        for i, agreement in enumerate(found):
            require_agreement(f"engine {i}", version, agreement, threshold, lambda i=i: self._difference(i))
        if self._under_way:
            gaps = self._engines.cache_gaps(np.resize(tokens, self._under_way))
            for i, gap in enumerate(gaps):
                require_own_cache(f"engine {i}", version, gap, threshold)
        worst = max(agreement.mean for agreement in found)
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
        for i, theirs in enumerate(self._engines.checksums(names)):
            require_same(f"engine {i}", version, first_difference(ours, theirs))

    def _difference(self, engine: int) -> str | None:
        return first_difference(self.trainers.checksums(), self._engines.checksums()[engine])
