"""What the saving tests run on ranks: a rank's state saved at one layout, at another, in the background, or killed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

from launch import Rank, free_port
from step_cases import Overrides, Ports, load, make_config, make_groups, save, start

from stare_megatron import checkpoint
from stare_megatron.algo.controller import ControllerState
from stare_megatron.config import CheckpointConfig, Config
from stare_megatron.data.prompts import StreamState
from stare_megatron.host import manifest
from stare_megatron.host.node_disk import NodeDisk
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import Control, GateDuty, Observed, UpdateStats

STATE = checkpoint.LoopState(
    0, 0, StreamState(0, 0, 0, ""), ControllerState(1.0, 1.0), Observed(0.0, 0.0), GateDuty(0, 0), ""
)


def step(trainer: TrainerRank, config: Config, seed: int) -> UpdateStats:
    load(trainer, config, make_groups(seed=seed))
    entropy = trainer.score().entropy
    (stats,) = trainer.update(Control(True, 1.5, 0.5, entropy, 9.0)).updates
    return stats


def reshard(
    rank: Rank, *, checkpoint: Path, layout: Overrides, source: Path | None, out: Path
) -> tuple[UpdateStats, list[str]]:
    """Restored from `source`, or one step done; saved to `out`. The statistics of the next step, and this rank's
    files."""
    config = make_config(checkpoint, layout)
    trainer = start(rank, config)
    if source is None:
        step(trainer, config, 1)
    else:
        assert trainer.restore(source) == 7
    trainer.begin_save(out, 7)
    entries = trainer.finish_save()
    found = step(trainer, config, 2)
    trainer.close()
    return found, sorted(entries)


def unstarted(rank: Rank, *, checkpoint: Path, layout: Overrides, out: Path) -> list[UpdateStats]:
    """Two steps by a trainer that was saved before the first, and by one restored from there."""
    ports, config = Ports(rank), make_config(checkpoint, layout)
    trainer = start(ports.next(), config)
    save(trainer, out, 0)
    assert trainer.held_step() == 0
    found = [step(trainer, config, 1), step(trainer, config, 2)]
    assert trainer.held_step() == 2
    trainer.close()
    trainer = start(ports.next(), config)
    assert trainer.restore(out) == 0
    found += [step(trainer, config, 1), step(trainer, config, 2)]
    _spoil(trainer, config)
    trainer.close()
    return found


def _spoil(trainer: TrainerRank, config: Config) -> None:
    """An update that fails holds no step, unless it had changed nothing yet."""
    from stare_megatron.errors import RunError
    from stare_megatron.trainer import rank

    works, norms = rank.step, rank.exact_sets
    for changes, held in ((False, 2), (True, None)):

        def fails(*args: Any, changes: bool = changes) -> Any:
            if changes:
                works(*args)
            raise RunError("spoilt")

        rank.step, rank.exact_sets = (fails, norms) if changes else (works, fails)
        with contextlib.suppress(RunError):
            step(trainer, config, 3)
        assert trainer.held_step() == held
    rank.step, rank.exact_sets = works, norms


def in_background(rank: Rank, *, checkpoint: Path, layout: Overrides, folder: Path) -> tuple[list[bool], bool]:
    """Saves the same state twice, in three rounds: to `at_once-*`, and to `later-*`, of which no byte is written
    before another step has changed everything. What `save_written` said before and after; whether the last save made
    use of the plan of those before."""
    config = make_config(checkpoint, layout)
    trainer = start(rank, config)
    from stare_megatron.trainer import writing

    write, allowed = writing._write, threading.Event()

    def write_later(*args: Any) -> Any:
        allowed.wait()
        return write(*args)

    said: list[bool] = []
    for number in range(3):
        step(trainer, config, 1)
        save(trainer, folder / f"at_once-{number}", 7)
        allowed.clear()
        writing._write = write_later
        trainer.begin_save(folder / f"later-{number}", 7, snapshot=True)
        step(trainer, config, 2)
        said.append(trainer.save_written())
        allowed.set()
        while not trainer.save_written():
            time.sleep(0.01)
        trainer.finish_save()
        said.append(trainer.save_written())
        writing._write = write
    reused = trainer._writer._strategy.validated_cache_reuse
    trainer.close()
    return said, reused


def unwritable(rank: Rank, *, checkpoint: Path, layout: Overrides, folder: Path) -> str:
    """What every rank says when rank 1 cannot write its file."""
    from stare_megatron.errors import RunError

    config = make_config(checkpoint, layout)
    trainer = start(rank, config)
    from stare_megatron.trainer import writing

    if rank.rank == 1:
        writing.manifest = _Full()  # type: ignore[assignment]
    said = ""
    try:
        save(trainer, folder, 1)
    except RunError as e:
        said = str(e)
    trainer.close()
    return said


class _Full:
    def checksum(self, path: Path) -> manifest.FileEntry:
        raise OSError(28, "No space left on device", str(path))


class _One:
    """A single rank and its disk as `checkpoint.Saver` wants all of them."""

    def __init__(self, trainer: TrainerRank) -> None:
        self._trainer = trainer
        disk = NodeDisk(0)
        self.tidy, self.begin_copy, self.copied, self.finish_copy = (
            disk.tidy,
            disk.begin_copy,
            disk.copied,
            disk.finish_copy,
        )
        self._disk = disk

    def room(self, home: Path) -> list[tuple[str, int]]:
        return [("here", self._disk.room(home))]

    def fault(self, folder: Path, *, contents: bool) -> str:
        return self._disk.fault(folder, contents)

    def begin_save(self, folder: Path, step: int, local: Path | None = None) -> None:
        self._trainer.begin_save(folder, step, snapshot=True, local=local)

    def save_written(self) -> bool:
        return self._trainer.save_written()

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        return self._trainer.finish_save()


def killed(
    rank: Rank, *, checkpoint: Path, root: Path, kills: int, seed: int, local: Path | None
) -> list[tuple[int, bool]]:
    """A process saves step after step until it is killed at a random moment; the next one loads the newest checkpoint
    and goes on. Of each: the step it loaded, and whether a save, or a copy of one, was under way at its end. `local`:
    on the node's own disk, and copied."""
    import stare_megatron_patches

    # What takes longest is imported once, in the parent of all.
    stare_megatron_patches.apply("megatron-core")
    for name in ("checkpoint", "model", "optimizer", "model_runner", "step", "bridge"):
        importlib.import_module(f"stare_megatron.trainer.{name}")
    rng = random.Random(seed)
    found, takes = [], 0.1
    for number in range(kills + 1):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                _save_forever(Rank(0, 1, 0, "127.0.0.1", free_port()), checkpoint, root, number, writing, local)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as lines:
            loaded = lines.readline()
            assert loaded, f"process {number} ended before it had loaded a checkpoint"
            for _ in range(rng.randint(0, 3)):
                began = time.monotonic()
                assert lines.readline(), f"process {number} ended in a save"
                takes = time.monotonic() - began
            time.sleep(rng.uniform(0.0, takes))  # somewhere in the next save, however long one takes here
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found.append((int(loaded), any(root.glob("**/*.partial"))))
    return found


def _save_forever(rank: Rank, model: Path, root: Path, number: int, report: int, local: Path | None) -> None:
    config = make_config(model, {})
    trainer = start(rank, config)
    one, done, said = _One(trainer), 0, list[str]()
    newest = checkpoint.newest(root, one, contents=True, say=said.append, unreadable={})
    if newest is not None:
        assert checkpoint.is_local(newest) == (local is not None), said
        done = trainer.restore(newest / "trainer")
        assert done == checkpoint.read(newest).step
    keep = CheckpointConfig(asynchronous=bool(number % 2), keep_last=1 + number % 3, every=1, local=str(local or ""))
    saver = checkpoint.Saver(
        root,
        keep,
        checkpoint.Settings({}, {}),
        one,
        estimate=0,
        values=dict,
        warn=said.append,
        local=checkpoint.Local(root, local, keep, one) if local else None,
    )
    step(trainer, config, 1)
    os.write(report, f"{done}\n".encode())
    while True:
        done += 1
        saver.save(dataclasses.replace(STATE, step=done))
        saver.poll()
        os.write(report, b"saved\n")


def across_specs(rank: Rank, *, checkpoint: Path, converted: Path, folder: Path) -> list[UpdateStats]:
    """The next step after one that was saved: as it was, then with the checkpoint loaded back and forth between norms
    without and with an `_extra_state`, as Transformer Engine's have one, and from a checkpoint that holds them."""
    from stare_megatron.trainer import model_state, spec

    ports, config = Ports(rank), make_config(checkpoint, {})
    local, found = spec.RMSNorm, []

    class Norm(local):
        def get_extra_state(self) -> Any:
            import torch

            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state: Any) -> None:
            pass

    def go(norm: type, source: Path | None, out: Path, model: Path | str = "") -> None:
        spec.RMSNorm = norm
        trainer = start(ports.next(), make_config(checkpoint, {"model": {"weights": str(model)}}))
        if source is None:
            step(trainer, config, 1)
        else:
            assert trainer.restore(source) == 7
        save(trainer, out, 7)
        found.append(step(trainer, config, 2))
        trainer.close()

    go(local, None, folder / "local")
    go(Norm, folder / "local", folder / "engine", converted)
    go(local, folder / "engine", folder / "back", converted)
    sharded = model_state.sharded
    model_state.sharded = lambda module, metadata: module.sharded_state_dict(metadata=dict(metadata))  # type: ignore[operator]
    go(Norm, None, folder / "older")
    model_state.sharded = sharded
    go(local, folder / "older", folder / "newer")
    go(Norm, folder / "older", folder / "newest", folder / "older")
    return found


def on_own_disks(rank: Rank, *, checkpoint: Path, layout: Overrides, folder: Path) -> list[Any]:
    """Saves to the run's folder and to a disk of each rank's own, and copies the latter. The step after the save, by
    the trainer that saved and by one restored from the disks; then why another's restore is refused when a rank lacks
    its file, and the step by that one, restored from the run's folder instead."""
    import torch.distributed as dist

    from stare_megatron.errors import MissingFilesError

    ports, config = Ports(rank), make_config(checkpoint, layout)
    trainer = start(ports.next(), config)
    step(trainer, config, 1)
    save(trainer, folder / "durable/trainer", 7)
    linked = folder / "linked"
    trainer.begin_save(linked / "trainer", 7, local=folder / f"disk{rank.rank}")
    entries = {f"trainer/{name}": entry for name, entry in trainer.finish_save().items()}
    _share_manifest(linked, entries)
    disk = NodeDisk(rank.rank)
    assert disk.fault(linked, True) == ""
    (folder / "copied/trainer").mkdir(parents=True, exist_ok=True)
    disk.begin_copy(linked, folder / "copied")
    disk.finish_copy()
    found: list[Any] = [step(trainer, config, 2)]
    trainer.close()
    trainer = start(ports.next(), config)
    # As two nodes of two ranks see it.
    if rank.rank % 2 == 0:
        view = folder / f"view{rank.rank // 2}"
        shutil.copytree(linked / "trainer", view, symlinks=True)
        for other in {0, 1, 2, 3} - {rank.rank, rank.rank + 1}:
            for file in view.glob(f"__{other}_*"):
                file.unlink()
                file.symlink_to("/nowhere")
    dist.barrier()
    assert trainer.restore(folder / f"view{rank.rank // 2}") == 7
    found.append(step(trainer, config, 2))
    trainer.close()
    trainer = start(ports.next(), config)
    if rank.rank == 1:
        (folder / "disk1/__1_0.distcp").unlink()
        assert "missing" in disk.fault(linked, False)
    try:
        trainer.restore(linked / "trainer")
    except MissingFilesError as e:
        found.append(str(e))
    assert trainer.restore(folder / "durable/trainer") == 7
    found.append(step(trainer, config, 2))
    trainer.close()
    return found


def _share_manifest(folder: Path, mine: dict[str, manifest.FileEntry]) -> None:
    """Write the manifest of all ranks' files; a collective."""
    import torch.distributed as dist

    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    if dist.get_rank() == 0:
        manifest.write(folder, {name: entry for entries in everywhere for name, entry in entries.items()})
    dist.barrier()
