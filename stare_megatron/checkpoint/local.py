"""Checkpoints on the nodes' own disks (`checkpoint.local`): fast to write and to read, and gone with a node.

    checkpoints/local/step_000040/                  as any checkpoint's folder, and `place.json`
    checkpoints/local/step_000040/trainer/__3_0.distcp -> LOCAL/NAME-1f0c2a7e/step_000040-9b1d66e0/__3_0.distcp

What the driver writes and the plan of what is where are in the run's folder. Files of ranks are links, which lead to a
file on the nodes that have it: those of the ranks that wrote it. So every rank reads and checks such a checkpoint as
any other, as long as it is where it was. No two saves use the same folder of a node: a link never leads to a file of
another save of the same step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stare_megatron.checkpoint import state as loop
from stare_megatron.checkpoint import store
from stare_megatron.checkpoint.store import LOCAL, PLACE
from stare_megatron.config import CheckpointConfig, Config
from stare_megatron.errors import UserError
from stare_megatron.host import manifest
from stare_megatron.host.files import write_atomic
from stare_megatron.host.node_disk import file_rank

# The next checkpoint may be somewhat larger, and metrics and logs go to the same disk.
MARGIN = 1.05


class NodeDisks(Protocol):
    """All trainer ranks, each with the disk of its node."""

    def room(self, home: Path) -> list[tuple[str, int]]:
        """Of each rank, its node and the free bytes on the disk there that `home` is on."""
        ...

    def tidy(self, home: Path, keep: Collection[str]) -> None:
        """Remove all folders of `home` but those of these names."""
        ...

    def fault(self, folder: Path, *, contents: bool) -> str:
        """Which rank cannot go on from a checkpoint, and why; "" if all can. `contents`: compare checksums."""
        ...

    def begin_copy(self, folder: Path, target: Path) -> None:
        """Start to copy the ranks' files of a checkpoint to the same places in `target`, whose folders are there."""
        ...

    def copied(self) -> bool: ...

    def finish_copy(self) -> None:
        """Wait until all are copied. Raises: RunError: one cannot be, or is not what was written."""
        ...


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the files of `ranks` ranks are, on each one's node."""

    folder: Path
    ranks: int


def home_of(config: Config) -> Path:
    """The folder of a run's checkpoints on each node."""
    name = hashlib.sha256(str(config.folder.absolute()).encode()).hexdigest()[:8]
    return Path(config.checkpoint.local) / f"{config.run.name}-{name}"


def complete(root: Path) -> list[Path]:
    """Those of the run with this `checkpoints/`, oldest first; what the nodes still have of them is not looked at."""
    return [folder for folder in store.complete(root / LOCAL) if (folder / PLACE).is_file()]


def is_local(folder: Path) -> bool:
    return (folder / PLACE).is_file()


def write_place(folder: Path, place: Place) -> None:
    write_atomic(folder / PLACE, json.dumps({"folder": str(place.folder), "ranks": place.ranks}))


def read_place(folder: Path) -> Place:
    """Raises: UserError: it is damaged."""
    file = folder / PLACE
    try:
        tree = json.loads(file.read_text())
        return Place(Path(tree["folder"]), int(tree["ranks"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not the place of a checkpoint: {type(e).__name__}: {e}") from e


def linked(folder: Path) -> dict[str, manifest.FileEntry]:
    """Entries of the files that are on nodes."""
    return {name: entry for name, entry in (manifest.read(folder) or {}).items() if file_rank(name) >= 0}


def newest_first(root: Path) -> list[Path]:
    """What a run may go on from: its newest durable checkpoint, and before that the local ones that are not older."""
    durable = store.find(root, "auto")
    oldest = store.step_of(durable) if durable else 0
    local = [folder for folder in reversed(complete(root)) if store.step_of(folder) >= oldest]
    return [*local, *([durable] if durable else [])]


def newest(
    root: Path, disks: NodeDisks, *, contents: bool, say: Callable[[str], None], unreadable: Mapping[Path, str]
) -> Path | None:
    """The newest checkpoint of a run that every rank can read; None where there is none. Says which, and why, if local
    ones are among those to choose from.

    `unreadable`: local ones that ranks have failed to read, and why. `contents`: compare checksums.

    Raises:
        UserError: it is a durable one that is damaged. RunError: a rank is gone.
    """
    why = ""
    for folder in newest_first(root):
        if not is_local(folder):
            if why:
                say(f"going on from {folder}, since a newer one on the nodes' own disks is not whole: {why}")
            store.verify(folder, contents=contents)
            return folder
        fault = unreadable.get(folder) or _fault(folder, disks, contents)
        if not fault:
            say(f"going on from {folder}, which every node has whole on its own disk")
            return folder
        why = why or f"{folder.name}: {fault}"
    if why:
        say(f"no checkpoint to go on from: the one on the nodes' own disks is not whole: {why}")
    return None


def _fault(folder: Path, disks: NodeDisks, contents: bool) -> str:
    try:
        own = {name: e for name, e in (manifest.read(folder) or {}).items() if file_rank(name) < 0}
        if loop.FILE not in own:
            return f"{folder / manifest.NAME} is missing, or does not list {loop.FILE}"
        manifest.compare(folder, own, contents=contents)
        there, now = read_place(folder).ranks, len(disks.room(folder))
    except UserError as e:
        return str(e).partition("; copy")[0]
    if there != now:
        return f"{there} ranks wrote it, the run has {now}"
    return disks.fault(folder, contents=contents)


def drop(root: Path, *, after: int) -> list[str]:
    """Forget the local checkpoints of later steps; returns their names. The nodes' files go with the next save."""
    later = [folder for folder in complete(root) if store.step_of(folder) > after]
    _forget(root, later)
    return [folder.name for folder in later]


def _forget(root: Path, folders: Sequence[Path]) -> None:
    """Remove local checkpoints of the run, and have `latest` name one that is left."""
    latest = root / LOCAL / store.LATEST
    left = [folder for folder in complete(root) if folder not in folders]
    if left and folders:
        write_atomic(latest, left[-1].name + "\n")
    elif folders:
        latest.unlink(missing_ok=True)
    store.remove(folders)


class Local:
    """The local checkpoints of a run that makes some. `home`: their folder on each node; `root`: `checkpoints/`."""

    def __init__(self, root: Path, home: Path, config: CheckpointConfig, disks: NodeDisks) -> None:
        self.root = root / LOCAL
        self.disks = disks
        self._checkpoints = root
        self._home = home
        self._config = config

    def due(self, step: int) -> bool:
        """Whether a copy of that step goes to the run's folder."""
        c = self._config
        number, rest = divmod(step, c.every) if c.every else (step, 1)
        return bool(rest or number % c.durable_every == 0 or (c.keep_every and step % c.keep_every == 0))

    def find(self, step: int) -> Path | None:
        """The whole one of a step."""
        folder = self.root / store.folder_name(step)
        return folder if folder in complete(self._checkpoints) else None

    def place(self, step: int, estimate: int) -> tuple[Place | None, str]:
        """Where the next one goes, and why nowhere, if a node has no room. `estimate`: bytes, if there is no other."""
        store.sweep(self.root)
        self._tidy()
        free = self.disks.room(self._home)
        needs = self._needs(len(free), estimate)
        for node in dict.fromkeys(node for node, _ in free):
            here = [rank for rank, (name, _) in enumerate(free) if name == node]
            need, room = sum(needs[rank] for rank in here), min(free[rank][1] for rank in here)
            if room < need:
                who = f"{node}: " if node else ""
                lack = f"{room / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB needed"
                return None, f"{who}{self._home}: no room to save step {step}: {lack}"
        name = f"{store.folder_name(step)}-{secrets.token_hex(4)}"
        return Place(self._home / name, len(free)), ""

    def _needs(self, ranks: int, estimate: int) -> list[int]:
        """Bytes that each rank will write."""
        known = [0] * ranks
        older = complete(self._checkpoints) or store.complete(self._checkpoints)
        for name, entry in (linked(older[-1]) if older else {}).items():
            if file_rank(name) < ranks:
                known[file_rank(name)] += entry.bytes
        total = sum(entry.bytes for entry in linked(older[-1]).values()) if older else estimate
        each = known if sum(known) == total else [total // ranks] * ranks
        return [int(size * MARGIN) for size in each]

    def prune(self, busy: Collection[int]) -> None:
        """Keep the newest, and those of the steps `busy`."""
        old = complete(self._checkpoints)[: -self._config.local_keep]
        store.remove([folder for folder in old if store.step_of(folder) not in busy])
        self._tidy()

    def clear(self) -> None:
        """A newer one is in the run's folder, and the run ends."""
        _forget(self._checkpoints, complete(self._checkpoints))
        self._tidy()

    def _tidy(self) -> None:
        self.disks.tidy(self._home, [read_place(folder).folder.name for folder in complete(self._checkpoints)])
