"""Weights into the engines, and the check that they arrived."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from stare_megatron.config import SyncConfig
from stare_megatron.sync.check import compare, first_difference, require_agreement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stare_megatron.cluster.engines import EngineGroup
    from stare_megatron.cluster.trainers import TrainerGroup


class Weights:
    """Pushes the trainer's weights into the engines. `probe_tokens`: makes the prompt that both are compared
    on, int32 [n]."""

    def __init__(
        self,
        config: SyncConfig,
        trainers: TrainerGroup,
        engines: EngineGroup,
        probe_tokens: Callable[[], npt.NDArray[np.int32]],
    ) -> None:
        self._config = config
        self._trainers = trainers
        self._engines = engines
        self._probe_tokens = probe_tokens

    def push(self, version: int) -> None:
        """Stream the weights of `version` into every engine."""
        self._trainers.push(version)

    def probe(self, version: int) -> float:
        """The largest mean |log-prob difference| between an engine and the trainer on the probe prompt, nats; NaN when
        `sync.probe_every` asks for none now.

        Raises:
            RunError: it is above `sync.probe_threshold`; names the engine and the first parameter that differs.
        """
        every = self._config.probe_every
        if not every or version % every:
            return math.nan
        tokens = self._probe_tokens()
        ours = self._trainers.score_tokens(tokens)
        worst = 0.0
        for i, theirs in enumerate(self._engines.logprobs(tokens)):
            agreement = compare(theirs, ours)
            worst = max(worst, agreement.mean)
            require_agreement(
                f"engine {i}", version, agreement, self._config.probe_threshold, lambda i=i: self._difference(i)
            )
        return worst

    def _difference(self, engine: int) -> str | None:
        return first_difference(self._trainers.checksums(), self._engines.checksums()[engine])
