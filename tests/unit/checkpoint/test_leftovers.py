"""What saves leave behind that did not come to their end."""

from __future__ import annotations

from pathlib import Path

import pytest

from stare_megatron import config
from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import LoopState, Saver, Settings
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import RunError
from stare_megatron.host import manifest
from stare_megatron.types import GateDuty, Observed


class FullDisk:
    """Ranks that cannot write."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def held_step(self) -> int | None:
        return 2

    def begin_save(self, folder: Path, step: int) -> None:
        folder.mkdir()

    def save_written(self) -> bool:
        return True

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        raise self._error


@pytest.mark.parametrize("error", [RunError("no space left"), OSError(28, "no space left")])
def test_a_save_that_fails_or_was_killed_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "step_000009.partial/trainer").mkdir(parents=True)
    keep = config.CheckpointConfig(asynchronous=False)
    saver = Saver(tmp_path, keep, Settings({}, {}), FullDisk(error), estimate=1000, values=dict, warn=pytest.fail)
    state = LoopState(
        2, 20, StreamState(0, 2, 1, "x"), ControllerState(1.0, 1.0), Observed(0.5, 0.0), GateDuty(2, 0), "id"
    )
    with pytest.raises(type(error), match="no space left"):
        saver.save(state)
    assert list(tmp_path.iterdir()) == []
