"""Warns once when a controller's gain is too strong for samples of older policies."""

from __future__ import annotations

from collections.abc import Callable

from stare_megatron.algo.gain import response, too_strong
from stare_megatron.config import Config
from stare_megatron.types import Control

_EVERY = 10  # steps; an estimate takes less than a millisecond


class GainWatch:
    """Follows entropy and weights of this start of the run. `note`: shows the user a line."""

    def __init__(self, config: Config, note: Callable[[str], None]) -> None:
        self._stare = config.algorithm.stare
        self._delay = config.sampling.oldest
        self._watching = config.sampling.ahead and config.algorithm.method == "stare"
        self._note = note
        self._entropy: list[float] = []
        self._strength: list[float] = []

    def saw(self, control: Control) -> None:
        """A step's control."""
        if not self._watching:
            return
        self._entropy.append(control.entropy)
        self._strength.append(control.weight_pos - 1.0 if control.gate_on else 0.0)
        if len(self._entropy) % _EVERY:
            return
        k = response(self._entropy, self._strength)
        if k is not None and (warning := too_strong(self._stare, k, self._delay)):
            self._note(warning)
            self._watching = False
