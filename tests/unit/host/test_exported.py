"""Which policy a run's folder has exported at its end."""

from __future__ import annotations

import os

import pytest

from stare_megatron.host import manifest
from stare_megatron.host.exported import exported


def sealed(folder, second):
    """A folder whose manifest was written then."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    manifest.write(folder)
    os.utime(folder / manifest.NAME, (second, second))


@pytest.fixture
def run(tmp_path):
    """It has saved step 4, at its end, and then exported it."""
    sealed(tmp_path / "checkpoints/step_000004", 1000)
    (tmp_path / "checkpoints/latest").write_text("step_000004\n")
    sealed(tmp_path / "hf", 1001)
    return tmp_path


def test_what_was_exported_at_the_end_is_the_runs_policy(run):
    assert exported(run) == run / "hf"


def test_a_run_that_went_on_has_exported_nothing_of_what_it_learned_since(run):
    sealed(run / "checkpoints/step_000006", 2000)
    assert exported(run) == run / "hf"  # the checkpoint is not whole before `latest` names it
    (run / "checkpoints/latest").write_text("step_000006\n")
    assert exported(run) is None


def test_without_what_tells_there_is_what_is_there(run, tmp_path):
    assert exported(tmp_path / "nowhere") is None
    (run / "checkpoints/latest").unlink()
    assert exported(run) == run / "hf"
    (run / "hf" / manifest.NAME).unlink()
    assert exported(run) == run / "hf"
    (run / "hf/config.json").unlink()
    assert exported(run) is None
