"""A run that goes on from an older checkpoint: later ones of the branch it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import LoopState, Settings, store
from stare_megatron.config import CheckpointConfig
from stare_megatron.data.prompts import StreamState
from stare_megatron.types import UNOBSERVED, GateDuty


def save(root: Path, step: int, branch: str) -> None:
    """A checkpoint, and what a run removes after it with `keep_last = 2`."""
    state = LoopState(step, 9, StreamState(0, 2, 1, "x"), ControllerState(1.0, 1.0), UNOBSERVED, GateDuty(2, 0), "")
    partial = store.begin(root, state, Settings({}, {}))
    (partial / store.TRAINER).mkdir()
    (partial / store.TRAINER / "branch").write_text(branch)
    store.finish(root, step, {})
    store.prune(root, CheckpointConfig(keep_last=2), {})


def branches(root: Path) -> dict[str, str]:
    return {p.name: (p / store.TRAINER / "branch").read_text() for p in sorted(root.glob("*step_*"))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (20, 40):
        save(tmp_path, step, "a")
    return tmp_path


def test_the_new_branch_wins_and_the_old_one_stays(root: Path) -> None:
    assert store.set_aside(root, root / "step_000020", 20) == [root / "left_step_000040"]
    assert (root / store.LATEST).read_text() == "step_000020\n"
    save(root, 30, "b")
    assert branches(root) == {"left_step_000040": "a", "step_000020": "a", "step_000030": "b"}
    assert store.find(root, "auto") == root / "step_000030"


def test_a_branch_left_twice_has_two_names(root: Path) -> None:
    for branch in ("b", "c"):
        store.set_aside(root, root / "step_000020", 20)
        save(root, 40, branch)
    assert branches(root) == {
        "left_step_000040": "a",
        "left_step_000040_2": "b",
        "step_000020": "a",
        "step_000040": "c",
    }


def test_who_returns_to_the_old_branch_has_it_under_its_name(root: Path) -> None:
    store.set_aside(root, root / "step_000020", 20)
    save(root, 40, "b")
    again = store.find(root, str(root / "left_step_000040"))
    assert again is not None
    assert store.set_aside(root, again, 40) == [root / "left_step_000040_2"]
    assert branches(root) == {"left_step_000040_2": "b", "step_000020": "a", "step_000040": "a"}
    assert (root / store.LATEST).read_text() == "step_000040\n"


@pytest.mark.parametrize("elsewhere", [True, False])
def test_nothing_is_renamed_for_the_newest_or_another_runs(root: Path, tmp_path_factory, elsewhere: bool) -> None:
    before = branches(root)
    other = tmp_path_factory.mktemp("other")
    save(other, 20, "x")
    assert (
        store.set_aside(root, other / "step_000020" if elsewhere else root / "step_000040", 40 - 20 * elsewhere) == []
    )
    assert branches(root) == before
