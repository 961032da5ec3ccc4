"""What saves leave behind that did not come to their end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stare_megatron import config
from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import LoopState, Saver, Settings, store
from stare_megatron.checkpoint import saver as saver_module
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

    def begin_save(self, folder: Path, step: int, local: Path | None = None) -> None:
        folder.mkdir()

    def save_written(self) -> bool:
        return True

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        raise self._error


STATE = LoopState(2, 20, StreamState(0, 2, 1, "x"), ControllerState(1.0, 1.0), Observed(0.5, 0.0), GateDuty(2, 0), "id")


def make_saver(root: Path, ranks: FullDisk) -> Saver:
    keep = config.CheckpointConfig(asynchronous=False)
    return Saver(root, keep, Settings({}, {}), ranks, estimate=1000, values=dict, warn=pytest.fail)


@pytest.mark.parametrize("error", [RunError("no space left"), OSError(28, "no space left")])
def test_a_save_that_fails_or_was_killed_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "step_000009.partial/trainer").mkdir(parents=True)
    saver = make_saver(tmp_path, FullDisk(error))
    with pytest.raises(type(error), match="no space left"):
        saver.save(STATE)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_does_not_take_the_room_of_the_next(tmp_path: Path, monkeypatch) -> None:
    left = tmp_path / "step_000009.partial"
    left.mkdir()
    monkeypatch.setattr(saver_module, "free_bytes", lambda _: 10 if left.exists() else 10**9)
    saver = make_saver(tmp_path, FullDisk(RunError("as far as the ranks")))
    with pytest.raises(RunError, match="as far as the ranks"):  # and not: no room
        saver.save(STATE)


def test_a_rename_that_fails_leaves_the_older_checkpoint_of_the_step(tmp_path: Path, monkeypatch) -> None:
    old = tmp_path / store.folder_name(2)
    old.mkdir()
    (old / "x").write_text("old")
    partial = store.begin(tmp_path, STATE, Settings({}, {}))
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source) == partial:
            raise OSError(5, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="input/output error"):
        store.finish(tmp_path, 2, {})
    store.sweep(tmp_path)
    assert (old / "x").read_text() == "old"
