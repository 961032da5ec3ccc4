"""The folder `checkpoints/` of a run: what is in it, how a new one gets there, which ones stay."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from stare_megatron.checkpoint import ahead as sampled
from stare_megatron.checkpoint import settings as stored
from stare_megatron.checkpoint import state as loop
from stare_megatron.checkpoint.ahead import Ahead, Outstanding
from stare_megatron.checkpoint.settings import Settings
from stare_megatron.checkpoint.state import LoopState
from stare_megatron.config import CheckpointConfig
from stare_megatron.errors import UserError
from stare_megatron.host import manifest
from stare_megatron.host.files import PARTIAL, STALE, sync_folder, take_place, write_atomic
from stare_megatron.host.node_disk import file_rank

TRAINER = "trainer"
LATEST = "latest"
LEFT = "left_"
LOCAL = "local"  # under which those on the nodes' own disks are, see `local`, each with a file `PLACE`
PLACE = "place.json"

_SEEN_WITHIN_S = 10.0
_LOOK_S = 0.2
_NAMED = 3


def folder_name(step: int) -> str:
    return f"step_{step:06d}"


def partial_of(root: Path, step: int) -> Path:
    """The unfinished folder of a step."""
    return root / (folder_name(step) + PARTIAL)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def begin(root: Path, state: LoopState, settings: Settings, ahead: Ahead | Outstanding | None = None) -> Path:
    """Make the unfinished folder of a step, with everything but the ranks' part, which goes to its `trainer/`.

    `ahead`: what was sampled ahead, if anything was.
    """
    partial = partial_of(root, state.step)
    partial.mkdir(parents=True)
    loop.write(partial, state)
    stored.write(partial, settings)
    if ahead is not None:
        sampled.write(partial, ahead)
    return partial


def finish(root: Path, step: int, known: Mapping[str, manifest.FileEntry]) -> Path:
    """Seal what `begin` made with a manifest, give it its name, and let `latest` say so; returns the folder.

    `known`: entries of files that were hashed by who wrote them, by path relative to the folder.

    Raises:
        OSError: a file is not there, cannot be read, or not written.
    """
    final, partial = root / folder_name(step), partial_of(root, step)
    _await_files(partial, known)
    manifest.write(partial, known)
    stale = take_place(partial, final)
    sync_folder(root)
    write_atomic(root / LATEST, final.name + "\n")
    sync_folder(root)
    shutil.rmtree(stale, ignore_errors=True)
    return final


def _await_files(folder: Path, known: Mapping[str, manifest.FileEntry]) -> None:
    """Returns when all that ranks say they have written is seen from here, which may take a network file system a
    moment.

    Raises:
        OSError: a file is not: the folder of some node is not this one.
    """
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while names := manifest.unseen(folder, known):
        if time.monotonic() > deadline:
            ranks = ", ".join(str(rank) for rank in sorted({file_rank(name) for name in names}))
            rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise OSError(
                f"{socket.gethostname()} does not see {', '.join(names[:_NAMED])}{rest} in the size that trainer rank "
                f"{ranks} wrote; see whether the file system of {folder.parent} is mounted on that rank's host (the "
                "first line of logs/trainer_N.log) and on this one; nothing older is removed"
            )
        time.sleep(_LOOK_S)


def sweep(root: Path) -> None:
    """Remove what saves that failed or were killed have left."""
    for folder in root.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def complete(root: Path) -> list[Path]:
    """Whole checkpoint folders, oldest first."""
    found = (p for p in root.glob("step_*") if p.suffix != PARTIAL and (p / loop.FILE).is_file())
    return sorted(found, key=step_of)


def set_aside(root: Path, folder: Path, step: int) -> list[Path]:
    """Make `folder`, a checkpoint of `step`, the newest of those in `root` if it is one of them: later ones, of a
    branch that is left, are renamed to `left_step_N`, which nothing chooses or removes. Returns their new paths.

    One that had been set aside takes its old name, and the place of what has that name now.

    Raises:
        OSError: a folder cannot be renamed; each is whole under the one name or the other.
    """
    if folder.resolve().parent != root.resolve():
        return []
    folder, own = root / folder.resolve().name, root / folder_name(step)
    left = [p for p in complete(root) if step_of(p) > step or (p == own and p != folder)]
    renamed = [_left_name(p) for p in left]
    # The newest first: `auto` never sees the branch as it was with its middle missing.
    for old, new in reversed(list(zip(left, renamed, strict=True))):
        os.rename(old, new)
    if folder != own:
        os.rename(folder, own)
    if left or folder != own:
        write_atomic(root / LATEST, own.name + "\n")
        sync_folder(root)
    return renamed


def _left_name(folder: Path) -> Path:
    names = (LEFT + folder.name + (f"_{n}" if n > 1 else "") for n in itertools.count(1))
    return next(path for path in map(folder.with_name, names) if not path.exists())


def size(folder: Path) -> int:
    """Bytes of a whole checkpoint."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def prune(root: Path, keep: CheckpointConfig, values: Mapping[int, float]) -> None:
    """Remove the checkpoints that nothing keeps. `values`: of the metric that tells the best, by step."""
    remove(stale(complete(root), keep, values))


def remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        # A folder that is half removed must not look whole.
        doomed = folder.with_name(folder.name + STALE)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def stale(folders: list[Path], keep: CheckpointConfig, values: Mapping[int, float]) -> list[Path]:
    """Those of `folders` (oldest first) that neither `keep_last` nor `keep_every` nor the best value keeps.

    Of equal values the newest counts; NaN is no value.
    """
    kept = {step_of(f) for f in folders[-keep.keep_last :]}
    steps = [step_of(f) for f in folders]
    if keep.keep_every:
        kept |= {s for s in steps if s % keep.keep_every == 0}
    if keep.best_metric:
        sign = 1 if keep.best_mode == "max" else -1
        rated = [(sign * values[s], s) for s in steps if s in values and values[s] == values[s]]
        if rated:
            kept.add(max(rated)[1])
    return [f for f in folders if step_of(f) not in kept]


def find(root: Path, resume: str) -> Path | None:
    """The checkpoint folder `run.resume` means, or None to start afresh.

    Raises:
        UserError: `never` with checkpoints present, or a folder that is no complete checkpoint.
    """
    whole = complete(root)
    if resume == "never":
        if whole := whole or complete(root / LOCAL):
            raise UserError(
                f"{root}: the run already has a checkpoint ({whole[-1].name}); continue it with run.resume=auto, or "
                "choose another run.name"
            )
        return None
    if resume == "auto":
        return whole[-1] if whole else None
    folder = Path(resume)
    if not (folder / loop.FILE).is_file() or not (folder / TRAINER).is_dir():
        raise UserError(f"run.resume = {resume!r}: neither never, auto nor a checkpoint folder (loop.json, trainer/)")
    if folder.suffix == PARTIAL:
        raise UserError(f"run.resume = {resume!r}: was not written to its end; resume from another checkpoint")
    if (folder / PLACE).is_file():
        raise UserError(
            f"run.resume = {resume!r}: lies on the nodes' own disks, which run.resume=auto looks at; name a checkpoint "
            "in the folder above it"
        )
    return folder


def _needed(folder: Path) -> set[str]:
    """Files that no checkpoint is without. Megatron-Core 0.19 has the content of the earlier `common.pt` among the
    tensors, and `metadata.json` says nothing of it."""
    form = folder / TRAINER / "metadata.json"
    common = {f"{TRAINER}/common.pt"} if form.is_file() and "common_backend" in form.read_text() else set()
    return {loop.FILE, stored.FILE, f"{TRAINER}/.metadata", f"{TRAINER}/metadata.json", *common}


def verify(folder: Path, *, contents: bool, progress: Callable[[int], object] = int) -> None:
    """Compare a checkpoint with its manifest; `contents`: checksums too.

    Raises:
        UserError: a file is missing, or not what was written; also a manifest that is missing or leaves one out.
    """
    try:
        entries = manifest.read(folder)
        if entries is None:
            raise UserError(f"{folder}: {manifest.NAME} is missing, so the files cannot be checked")
        for name in sorted(_needed(folder) - entries.keys()):
            raise UserError(f"{folder / manifest.NAME}: does not list {name}")
        threads = min(os.cpu_count() or 1, 8)
        manifest.verify(folder, contents=contents, threads=threads, progress=progress)
    except UserError as e:
        others = [p.name for p in complete(folder.parent) if p.name != folder.name]
        cure = f"run.resume={folder.parent / others[-1]}" if others else "start over under another run.name"
        fault = str(e).partition("; copy")[0]
        raise UserError(f"{fault}; restore the checkpoint from a copy, or {cure}") from e
