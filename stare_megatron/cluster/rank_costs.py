"""What one trainer rank's phases took of its memory, and what its pushes and saves moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stare_megatron.host import device
from stare_megatron.types import Measured

PHASES = ("score", "update", "push")
_SAME = {"fit": "update"}  # of supervised training
_MB, _GB = 2**20, 1e9


class RankCosts:
    """Since `take` was called last. `ranks`: of the trainer: rates are of all of them together."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._most = 0
        self._restart()

    def _restart(self) -> None:
        self._peaks = dict.fromkeys(PHASES, 0)
        self._moved = {"push": (0, 0.0), "save": (0, 0.0)}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, this process does what `PHASES` names; anything else goes by."""
        name = _SAME.get(name, name)
        if name not in PHASES:
            yield
            return
        self.peak()
        device.forget_peak()
        try:
            yield
        finally:
            self._peaks[name] = max(self._peaks[name], device.peak_memory_bytes())

    def moved(self, what: str, size: int, seconds: float) -> None:
        """A `push` or a `save` of `size` bytes."""
        before, so_far = self._moved[what]
        self._moved[what] = before + size, so_far + seconds

    def peak(self) -> int:
        """Most memory of this process so far, bytes."""
        self._most = max(self._most, device.peak_memory_bytes())
        return self._most

    def take(self) -> tuple[Measured, ...]:
        (pushed, push_s), (saved, save_s) = self._moved["push"], self._moved["save"]
        found = (
            *(Measured(f"memory/trainer_peak_{name}", peak / _MB) for name, peak in self._peaks.items()),
            Measured("throughput/pushed", pushed / _MB),
            Measured("throughput/saved", saved / _MB),
            Measured("rates/push_gbps", pushed / _GB, push_s / self._ranks),
            Measured("rates/save_gbps", saved / _GB, save_s / self._ranks),
        )
        self._restart()
        return found
