"""Training checkpoints on disk: whole or not at all, checked, refused when they are another run's, and kept or not."""

from __future__ import annotations

import json
import math
import shutil
import socket
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import checkpoint, config
from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import LoopState, Saver, Settings, store
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import RunError, UserError
from stare_megatron.host import manifest
from stare_megatron.metrics import wandb_id
from stare_megatron.run import eval as build_eval
from stare_megatron.types import GateDuty, Observed
from tests.configs import tables

KEEP = config.CheckpointConfig(asynchronous=False)
SETTINGS = Settings({}, {})


def state(step: int) -> LoopState:
    stream, before, duty = StreamState(0, step, 1, "x"), Observed(0.5, 0.0), GateDuty(step, 0)
    return LoopState(step, 10 * step, stream, ControllerState(1.0, 1.0), before, duty, "id")


class Ranks:
    """Writes a file as ranks would; `slow`: not before `finish_save`. `held`: the step whose weights they have."""

    def __init__(self, slow: bool = False, held: int | None = 3) -> None:
        self.slow = slow
        self.held = held
        self.ready = not slow
        self.folder = Path()

    def held_step(self) -> int | None:
        return self.held

    def begin_save(self, folder: Path, step: int, local: Path | None = None) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "metadata.json").write_text("{}")
        if not self.slow:
            self._write()

    def save_written(self) -> bool:
        return self.ready

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        self._write()
        return {"__0_0.distcp": manifest.checksum(self.folder / "__0_0.distcp")}

    def _write(self) -> None:
        (self.folder / "__0_0.distcp").write_bytes(bytes(range(200)))
        (self.folder / ".metadata").write_text("plan")


def saver(root: Path, keep: config.CheckpointConfig = KEEP, ranks: Ranks | None = None, **more: Any) -> Saver:
    rest: dict[str, Any] = {"estimate": 1000, "values": dict, "warn": pytest.fail} | more
    return Saver(root, keep, SETTINGS, ranks or Ranks(), **rest)


def saved(root: Path, *steps: int, **keep: Any) -> Path:
    writes = saver(root, KEEP.model_copy(update=keep))
    for step in steps:
        writes.save(state(step))
    return root / store.folder_name(steps[-1])


def tree(folder: Path) -> dict[str, Any]:
    """The tables of a run's configuration."""
    return tables(
        run={"dir": str(folder / "runs"), "steps": 3},
        model={"path": str(folder / "model")},
        algorithm={"method": "stare"},
    )


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_a_saved_checkpoint_is_whole_and_found(tmp_path):
    folder = saved(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_000003"]
    assert (tmp_path / "latest").read_text() == "step_000003\n"
    assert checkpoint.find(tmp_path, "auto") == folder
    assert checkpoint.read(folder) == state(3)
    checkpoint.verify(folder, contents=True)
    assert set(manifest.read(folder) or ()) == {
        "loop.json",
        "settings.json",
        "trainer/.metadata",
        "trainer/metadata.json",
        "trainer/__0_0.distcp",
    }


@pytest.mark.parametrize(("form", "needs"), [('{"common_backend": "torch"}', True), ("{}", False)])
def test_which_files_a_checkpoint_has_depends_on_its_format(tmp_path, form, needs):
    """Megatron-Core wrote `common.pt` until 0.19."""
    folder = saved(tmp_path, 3)
    (folder / "trainer/metadata.json").write_text(form)
    manifest.write(folder, {})
    if not needs:
        checkpoint.verify(folder, contents=True)
        return
    with pytest.raises(UserError, match=r"does not list trainer/common\.pt"):
        checkpoint.verify(folder, contents=True)
    (folder / "trainer/common.pt").write_text("common")
    manifest.write(folder, {})
    checkpoint.verify(folder, contents=True)


class Elsewhere(Ranks):
    """Rank 0, and a rank 1 whose node sees another folder under the path: the file system is not mounted there."""

    def __init__(self, arrives_after: float = math.inf) -> None:
        super().__init__()
        self._after = arrives_after

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        file = self.folder / "__1_0.distcp"
        if self._after < math.inf:
            threading.Timer(self._after, lambda: file.write_bytes(bytes(200))).start()
        file.write_bytes(b"a part")
        return super().finish_save() | {"__1_0.distcp": manifest.FileEntry(200, ""), "__1_1.distcp": self._gone()}

    def _gone(self) -> manifest.FileEntry:
        if self._after < math.inf:
            (self.folder / "__1_1.distcp").symlink_to("/on/another/node")
        return manifest.FileEntry(300, "")


def test_a_checkpoint_without_the_files_of_a_rank_is_not_sealed_and_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_SEEN_WITHIN_S", 0.0)
    saved(tmp_path, 1, 2)
    writes = saver(tmp_path, KEEP.model_copy(update={"keep_last": 1}), Elsewhere())
    with pytest.raises(RunError) as e:
        writes.save(state(3))
    assert f"{socket.gethostname()} does not see trainer/__1_0.distcp, trainer/__1_1.distcp" in str(e.value)
    assert "trainer rank 1 wrote" in str(e.value)
    assert f"{tmp_path}: cannot save step 3: " in str(e.value)
    assert "\n" not in str(e.value)
    assert names(tmp_path) == ["latest", "step_000001", "step_000002"]
    assert (tmp_path / "latest").read_text() == "step_000002\n"


def test_a_file_that_is_seen_a_moment_later_is_waited_for_and_links_lead_elsewhere(tmp_path):
    writes = saver(tmp_path, ranks=Elsewhere(arrives_after=0.5))
    writes.save(state(3))
    assert (manifest.read(tmp_path / "step_000003") or {})["trainer/__1_0.distcp"].bytes == 200


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path, 3)
    folder = saved(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_000003"]
    checkpoint.verify(folder, contents=True)


DAMAGE = {
    "flipped byte": ("trainer/__0_0.distcp", lambda f: f.write_bytes(bytes(range(199)) + b"!"), "damaged: checksum"),
    "truncated file": ("trainer/__0_0.distcp", lambda f: f.write_bytes(bytes(5)), "truncated: 5 bytes"),
    "missing shard": ("trainer/__0_0.distcp", lambda f: f.unlink(), "missing"),
    "changed loop state": ("loop.json", lambda f: f.write_text(f.read_text().replace("30", "31")), "damaged"),
    "missing settings": ("settings.json", lambda f: f.unlink(), "missing"),
    "no manifest": ("manifest.json", lambda f: f.unlink(), "manifest.json is missing"),
    "torn manifest": ("manifest.json", lambda f: f.write_text(f.read_text()[:50]), "not a manifest"),
    "manifest without the plan": ("manifest.json", lambda f: _forget(f, "trainer/.metadata"), "does not list"),
}


def _forget(file: Path, name: str) -> None:
    tree = json.loads(file.read_text())
    del tree["files"][name]
    file.write_text(json.dumps(tree))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_line_that_names_another_checkpoint(tmp_path, name):
    folder = saved(tmp_path, 2, 3)
    file, harm, message = DAMAGE[name]
    harm(folder / file)
    with pytest.raises(UserError, match=message) as refused:
        checkpoint.verify(folder, contents=True)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(f"or run.resume={tmp_path / 'step_000002'}")


def test_without_checksums_sizes_are_compared(tmp_path):
    folder = saved(tmp_path, 3)
    shard = folder / "trainer" / "__0_0.distcp"
    shard.write_bytes(bytes(200))
    checkpoint.verify(folder, contents=False)
    shard.write_bytes(bytes(199))
    with pytest.raises(UserError, match="truncated"):
        checkpoint.verify(folder, contents=False)


def test_a_damaged_checkpoint_is_not_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(build_eval.preflight, "check_eval", lambda *_, **__: [])
    folder = saved(tmp_path / "checkpoints", 3)
    file, damage, said = DAMAGE["flipped byte"]
    damage(folder / file)
    with pytest.raises(UserError, match=said):
        build_eval.evaluate(config.parse(tree(tmp_path), "test"), model=folder, out=tmp_path / "out")


def test_latest_and_auto_ignore_an_unfinished_folder(tmp_path):
    saved(tmp_path, 3)
    ranks = Ranks(slow=True)
    unfinished = saver(tmp_path, config.CheckpointConfig(), ranks)
    unfinished.save(state(4))
    unfinished.poll()  # not written yet
    assert unfinished.pending
    assert names(tmp_path) == ["latest", "step_000003", "step_000004.partial"]
    found = checkpoint.find(tmp_path, "auto")
    assert found is not None
    assert found.name == "step_000003"
    with pytest.raises(UserError, match="not written to its end"):
        checkpoint.find(tmp_path, str(tmp_path / "step_000004.partial"))
    ranks.ready = True
    unfinished.poll()
    assert not unfinished.pending
    assert names(tmp_path) == ["latest", "step_000003", "step_000004"]
    assert (tmp_path / "latest").read_text() == "step_000004\n"


def test_a_step_is_rescued_once(tmp_path, monkeypatch):
    said: list[str] = []
    ranks = Ranks()
    writes = saver(tmp_path, ranks=ranks, warn=said.append)
    for _ in range(2):
        writes.rescue(state(3))
    assert said == ["step 3 is saved: started again, the run goes on from there"]
    assert names(tmp_path) == ["latest", "step_000003"]
    monkeypatch.setattr(store, "begin", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    ranks.held = 4
    writes.rescue(state(4))
    assert said[1].startswith("step 4 is not saved: ")
    assert "No space left" in said[1]


@pytest.mark.parametrize("held", [None, 4])
def test_weights_of_no_step_or_another_are_not_saved_as_its_own(tmp_path, held):
    said: list[str] = []
    ranks = Ranks(slow=True, held=held)
    writes = saver(tmp_path, KEEP.model_copy(update={"asynchronous": True}), ranks, warn=said.append)
    writes.save(state(2))  # was copied while the weights were whole
    writes.rescue(state(3))
    assert names(tmp_path) == ["latest", "step_000002"]
    assert said == ["step 3 is not saved: the update after it has changed weights already"]


def test_a_rescue_ends_the_save_under_way(tmp_path):
    said: list[str] = []
    writes = saver(tmp_path, KEEP.model_copy(update={"asynchronous": True}), Ranks(slow=True), warn=said.append)
    writes.save(state(3))
    assert checkpoint.find(tmp_path, "auto") is None
    writes.rescue(state(3))
    assert names(tmp_path) == ["latest", "step_000003"]
    assert said == []


def test_a_rescue_without_room_claims_no_save(tmp_path, monkeypatch):
    said: list[str] = []
    ranks = Ranks()
    writes = saver(tmp_path, ranks=ranks, warn=said.append)
    writes.save(state(3))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 10))
    ranks.held = 4
    writes.rescue(state(4))
    (line,) = said
    assert "no room to save step 4" in line


def test_the_next_save_waits_for_the_one_before(tmp_path):
    writes = saver(tmp_path, config.CheckpointConfig(), Ranks(slow=True))
    writes.save(state(1))
    writes.save(state(2))
    assert (tmp_path / "latest").read_text() == "step_000001\n"
    writes.wait()
    assert (tmp_path / "latest").read_text() == "step_000002\n"


def kept(keep: dict[str, Any], values: dict[int, float], steps: range = range(1, 11)) -> list[int]:
    folders = [Path(store.folder_name(s)) for s in steps]
    stale = store.stale(folders, config.CheckpointConfig(**keep), values)
    return [store.step_of(f) for f in folders if f not in stale]


def test_what_is_kept():
    value = {2: 0.5, 4: 0.9, 5: 0.1, 6: 0.9, 8: math.nan}
    assert kept({"keep_last": 2}, value) == [9, 10]
    assert kept({"keep_last": 1, "keep_every": 4}, value) == [4, 8, 10]
    assert kept({"keep_last": 1, "best_metric": "eval/avg"}, value) == [6, 10]
    assert kept({"keep_last": 1, "best_metric": "eval/avg", "best_mode": "min"}, value) == [5, 10]
    assert kept({"keep_last": 1, "best_metric": "eval/avg"}, {}) == [10]
    assert kept({"keep_last": 1}, {}, range(999_999, 1_000_002)) == [1_000_001]


def test_the_best_so_far_is_given_up_for_a_better_one(tmp_path):
    values: dict[int, float] = {}
    keep = KEEP.model_copy(update={"keep_last": 1, "best_metric": "eval/avg"})
    writes = saver(tmp_path, keep, values=lambda: values)
    for step, value in ((1, 0.5), (2, 0.4), (3, 0.6), (4, 0.1)):
        values[step] = value
        writes.save(state(step))
        if step == 2:
            assert names(tmp_path) == ["latest", "step_000001", "step_000002"]
    assert names(tmp_path) == ["latest", "step_000003", "step_000004"]


def test_a_full_disk_skips_the_save_and_stops_only_a_run_without_a_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 300))
    said: list[str] = []
    saver(tmp_path, warn=said.append).save(state(2))
    (line,) = said
    assert "no room to save step 2: 0 MB free" in line
    assert line.endswith("the newest checkpoint stays step_000001")
    assert names(tmp_path) == ["latest", "step_000001"]
    with pytest.raises(RunError, match="no room to save step 2"):
        saver(tmp_path / "other").save(state(2))


def test_a_wandb_run_is_remembered_and_never_replaced(tmp_path):
    assert wandb_id.read(tmp_path) == ""
    wandb_id.keep(tmp_path, "")
    assert not (tmp_path / "wandb").exists()
    wandb_id.keep(tmp_path, "ab12")
    wandb_id.keep(tmp_path, "other")
    assert wandb_id.read(tmp_path) == "ab12"
