"""Checkpoints on nodes' own disks: where files lie, what is copied when, what is kept, and what a run goes on from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import checkpoint, config
from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import Local, LoopState, Saver, Settings, store
from stare_megatron.checkpoint import local as local_ones
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import RunError, UserError
from stare_megatron.host import manifest
from stare_megatron.host.node_disk import NodeDisk
from stare_megatron.metrics.console import last_checkpoint
from stare_megatron.types import GateDuty, Observed

GB = 10**9


def state(step: int) -> LoopState:
    stream, before, duty = StreamState(0, step, 1, "x"), Observed(0.5, 0.0), GateDuty(step, 0)
    return LoopState(step, 10 * step, stream, ControllerState(1.0, 1.0), before, duty, "id")


class Ranks:
    """Two ranks, each on a node of its own, which write a file each as real ones do. `slow`: copies do not end until
    somebody waits for them; `room`: free bytes of the nodes."""

    def __init__(self, slow: bool = False) -> None:
        self.slow = slow
        self.disks = [NodeDisk(rank) for rank in range(2)]
        self.room_of = [GB, GB]
        self.held: int | None = 0
        self.copying = False

    def held_step(self) -> int | None:
        return self.held

    def begin_save(self, folder: Path, step: int, local: Path | None = None) -> None:
        folder.mkdir()
        (folder / "metadata.json").write_text("{}")
        self.entries = {}
        for rank in range(2):
            path = folder / f"__{rank}_0.distcp"
            here = path if local is None else local / path.name
            here.parent.mkdir(parents=True, exist_ok=True)
            here.write_bytes(bytes([step, rank]) * 50)
            if local is not None:
                path.symlink_to(here)
            self.entries[path.name] = manifest.checksum(here)
        (folder / ".metadata").write_text("plan")

    def save_written(self) -> bool:
        return True

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        return self.entries

    def room(self, home: Path) -> list[tuple[str, int]]:
        return [(f"n{i + 1}", room) for i, room in enumerate(self.room_of)]

    def tidy(self, home: Path, keep: Any) -> None:
        for disk in self.disks:
            disk.tidy(home, keep)

    def fault(self, folder: Path, *, contents: bool) -> str:
        found = [disk.fault(folder, contents) for disk in self.disks]
        return next((f"trainer rank {rank}: {why}" for rank, why in enumerate(found) if why), "")

    def begin_copy(self, folder: Path, target: Path) -> None:
        self.copying = self.slow
        for disk in self.disks:
            disk.begin_copy(folder, target)

    def copied(self) -> bool:
        return not self.copying

    def finish_copy(self) -> None:
        for disk in self.disks:
            disk.finish_copy()


class Run:
    """A run's folder and the nodes' disks. Each `saver` is a start of the run."""

    def __init__(self, folder: Path) -> None:
        self.root, self.home = folder / "checkpoints", folder / "disk/run"
        self.said: list[str] = []
        self.ranks = Ranks()

    def saver(self, *, local: bool = True, **keys: Any) -> Saver:
        keep = config.CheckpointConfig(**{"every": 1, "local": str(self.home.parent)} | keys)
        disks = Local(self.root, self.home, keep, self.ranks) if local else None
        rest: dict[str, Any] = {"estimate": 1000, "values": dict, "warn": self.said.append, "local": disks}
        return Saver(self.root, keep, Settings({}, {}), self.ranks, **rest)

    def saved(self, *steps: int, **keys: Any) -> Saver:
        made = self.saver(**keys)
        for step in steps:
            made.save(state(step))
            made.wait()
        return made

    def newest(self, contents: bool = True) -> Path | None:
        return checkpoint.newest(self.root, self.ranks, contents=contents, say=self.said.append, unreadable={})

    @property
    def durable(self) -> list[int]:
        return [store.step_of(folder) for folder in store.complete(self.root)]

    @property
    def local(self) -> list[int]:
        return [store.step_of(folder) for folder in local_ones.complete(self.root)]

    @property
    def on_nodes(self) -> list[str]:
        return sorted(folder.name.partition("-")[0] for folder in self.home.glob("*"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in [*manifest.files(folder), manifest.NAME]}


def test_a_copy_is_what_a_save_would_have_been(run: Run, tmp_path: Path) -> None:
    run.saved(3)
    one = run.root / "local/step_000003"
    assert (one / "trainer/__1_0.distcp").is_symlink()
    assert (one / "trainer/__1_0.distcp").resolve().is_relative_to(run.home)
    assert not (one / "trainer/.metadata").is_symlink()
    copied = run.root / "step_000003"
    checkpoint.verify(copied, contents=True)
    assert (run.root / "latest").read_text() == "step_000003\n"
    plain = Run(tmp_path / "plain")
    plain.saved(3, local=False)
    assert contents(copied) == contents(plain.root / "step_000003")
    assert not any(path.is_symlink() for path in copied.rglob("*"))


def test_saving_does_not_wait_for_copies(run: Run) -> None:
    run.ranks.slow = True
    saver = run.saver(asynchronous=False)
    saver.save(state(1))
    assert (run.local, run.durable, saver.pending) == ([1], [], True)
    saver.save(state(2))
    saver.save(state(3))  # whose copy takes the turn of that of 2
    assert run.local == [1, 3], "1 is being copied, 3 will be, and is the newest"
    assert run.on_nodes == ["step_000001", "step_000003"]
    (line,) = run.said
    assert "step 2 is not copied" in line
    assert "checkpoint.durable_every" in line
    saver.poll()
    assert run.durable == []
    run.ranks.copying = run.ranks.slow = False
    saver.poll()
    saver.poll()
    assert (run.durable, saver.pending) == ([1, 3], False)
    saver.save(state(4))
    saver.wait()
    assert (run.local, run.on_nodes, run.durable) == ([4], ["step_000004"], [3, 4])


def test_every_nth_is_copied_and_the_last_is_durable(run: Run) -> None:
    saver = run.saved(*range(2, 15, 2), every=2, durable_every=3, keep_last=9, keep_every=8, local_keep=2)
    assert run.durable == [6, 8, 12]
    assert (run.local, run.on_nodes) == ([12, 14], ["step_000012", "step_000014"])
    saver.save(state(15), last=True)
    saver.wait()
    assert run.durable == [6, 8, 12, 15]
    assert (run.local, list(run.home.parent.iterdir())) == ([], []), "what a run has left on nodes when it has ended"


def test_a_step_that_is_no_multiple_is_copied(run: Run) -> None:
    run.saved(3, every=2, durable_every=2)
    assert run.durable == [3]


def test_the_local_one_is_taken_while_all_have_it(run: Run) -> None:
    run.saved(1, 2, every=1, durable_every=2)
    assert run.newest() == run.root / "local/step_000002", "of two of a step the one that is faster to read"
    assert last_checkpoint(run.root.parent) == run.root / "step_000002"
    run.saved(3, durable_every=2)
    run.said.clear()
    assert checkpoint.newest_first(run.root)[0] == run.newest() == run.root / "local/step_000003"
    assert run.said == [f"going on from {run.root / 'local/step_000003'}, which every node has whole on its own disk"]


def _lose(file: Path) -> None:
    os.unlink(os.path.realpath(file))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a node's folder": (
        lambda f: shutil.rmtree(os.path.dirname(os.path.realpath(f / "trainer/__1_0.distcp"))),
        "missing",
    ),
    "a rank's file": (lambda f: _lose(f / "trainer/__1_0.distcp"), "trainer rank 1"),
    "truncated": (lambda f: (f / "trainer/__1_0.distcp").write_bytes(bytes(9)), "truncated"),
    "flipped": (lambda f: (f / "trainer/__0_0.distcp").write_bytes(bytes(100)), "damaged: checksum"),
    "a link": (lambda f: (f / "trainer/__0_0.distcp").unlink(), "missing"),
    "the loop's state": (lambda f: (f / "loop.json").write_text("{}"), "truncated"),
    "the plan": (lambda f: (f / "trainer/.metadata").unlink(), "missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda f: (f / "manifest.json").write_text("{"), "not a manifest"),
    "torn place": (lambda f: (f / "place.json").write_text("{" * 50), "place.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_else_the_durable_one_and_why(run: Run, what: str) -> None:
    run.saved(2, 3, durable_every=2)
    harm, why = DAMAGE[what]
    harm(run.root / "local/step_000003")
    run.said.clear()
    assert run.newest() == run.root / "step_000002"
    (line,) = run.said
    assert line.startswith(
        f"going on from {run.root / 'step_000002'}, since a newer one on the nodes' own disks is not"
    )
    assert why in line
    assert "\n" not in line
    shutil.rmtree(run.root / "step_000002")
    assert run.newest() is None
    assert "no checkpoint to go on from" in run.said[1]


def test_sizes_alone_are_compared_on_wish(run: Run) -> None:
    run.saved(2, 3, durable_every=2)
    (run.root / "local/step_000003/trainer/__0_0.distcp").write_bytes(bytes(100))
    assert run.newest(contents=False) == run.root / "local/step_000003"
    assert run.newest() == run.root / "step_000002"


def test_another_number_of_ranks_reads_the_durable_one(run: Run) -> None:
    run.saved(2, 3, durable_every=2)
    run.ranks.room_of, run.ranks.disks = [GB], run.ranks.disks[:1]
    assert run.newest() == run.root / "step_000002"
    assert "2 ranks wrote it, the run has 1" in run.said[-1]


def test_an_older_local_one_and_what_ranks_cannot_read(run: Run) -> None:
    run.saved(2, 3, 5, every=1, durable_every=4, local_keep=3)
    assert run.durable == []
    _lose(run.root / "local/step_000005/trainer/__0_0.distcp")
    assert run.newest() == run.root / "local/step_000003"
    refused = {run.root / "local/step_000003": "rank 1 has no __0_0.distcp"}
    found = checkpoint.newest(run.root, run.ranks, contents=True, say=run.said.append, unreadable=refused)
    assert found == run.root / "local/step_000002"
    assert checkpoint.drop_local(run.root, after=2) == ["step_000003", "step_000005"]
    assert run.local == [2]
    assert last_checkpoint(run.root.parent) == run.root / "local/step_000002"
    checkpoint.drop_local(run.root, after=0)
    assert last_checkpoint(run.root.parent) is None


def test_a_damaged_durable_one_is_refused(run: Run) -> None:
    run.saved(2, 3, durable_every=2)
    _lose(run.root / "local/step_000003/trainer/__0_0.distcp")
    (run.root / "step_000002/trainer/__0_0.distcp").write_bytes(bytes(100))
    with pytest.raises(UserError, match="damaged"):
        run.newest()


def test_who_goes_on_from_a_local_one_copies_it_first(run: Run) -> None:
    run.saved(2, 3, durable_every=2)
    saver = run.saver(durable_every=2)
    saver.goes_on_from(run.root / "local/step_000003")
    saver.goes_on_from(run.root / "step_000002")
    saver.wait()
    assert run.durable == [2, 3]


def test_local_ones_are_no_choice_of_the_users(run: Run) -> None:
    run.saved(3, every=2, durable_every=2)
    one = run.root / "local/step_000003"
    with pytest.raises(UserError, match="lies on the nodes' own disks"):
        checkpoint.find(run.root, str(one))
    shutil.rmtree(run.root / "step_000003")
    with pytest.raises(UserError, match="already has a checkpoint"):
        checkpoint.find(run.root, "never")
    assert checkpoint.find(run.root, "auto") is None, "for who has no ranks"


def test_a_node_without_room(run: Run) -> None:
    run.ranks.room_of[1] = 100
    run.saved(2)
    assert (run.local, run.durable) == ([], [2])
    (line,) = run.said
    assert line.startswith(f"n2: {run.home}: no room to save step 2: 0 MB free")
    assert line.endswith(f"it goes to {run.root} at once")
    run.ranks.room_of[1] = 105  # what rank 1 wrote, and 5 %
    run.saved(3)
    assert run.local == [3]


def test_a_run_folder_without_room_for_a_copy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from stare_megatron.checkpoint import saver

    monkeypatch.setattr(saver, "free_bytes", lambda _: 10)
    run.saved(2)
    assert (run.local, run.durable) == ([2], [])
    (line,) = run.said
    assert "no room to save step 2" in line
    assert line.endswith("it stays on the nodes' own disks alone")


def test_a_rescue_makes_the_last_step_durable(run: Run) -> None:
    run.ranks.slow = True
    saver = run.saver(durable_every=2)
    saver.save(state(3))
    assert not run.durable
    run.ranks.slow = False
    run.ranks.held = None  # in the middle of an update: what there is of step 3 is the local one
    saver.rescue(state(3))
    assert (run.durable, run.said) == ([3], [])
    run.ranks.held = 4
    saver.rescue(state(4))
    assert run.durable == [3, 4]
    assert run.said == ["step 4 is saved: started again, the run goes on from there"]


def test_a_rescue_without_ranks_says_where_the_step_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = run.saved(3, durable_every=2)

    def gone() -> int | None:
        raise RunError("trainer rank 1 is gone")

    monkeypatch.setattr(run.ranks, "held_step", gone)
    saver.rescue(state(3))
    saver.rescue(state(4))
    assert run.said == [
        "step 3 is saved on the nodes' own disks alone: trainer rank 1 is gone",
        "step 4 is not saved: trainer rank 1 is gone",
    ]


def test_a_file_that_changed_is_not_copied(run: Run) -> None:
    run.saved(2, 3, durable_every=2)
    (run.root / "local/step_000003/trainer/__1_0.distcp").write_bytes(bytes(100))
    saver = run.saver()
    saver.goes_on_from(run.root / "local/step_000003")
    with pytest.raises(RunError, match="damaged: not what was written"):
        saver.wait()
    assert (run.durable, saver.pending) == ([2], False)
    assert not list(run.root.glob("*.partial"))
