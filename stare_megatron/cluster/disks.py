"""What trainer ranks do with checkpoints on their nodes' own disks, as seen by the driver."""

from __future__ import annotations

import abc
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stare_megatron.cluster import runtime
from stare_megatron.cluster.activity import ActivityLog
from stare_megatron.host.node_disk import NodeDisk


class HasDisk:
    """Base of a rank's actor."""

    _activity: ActivityLog
    _disk: NodeDisk

    def disk(self, method: str, *args: Any) -> Any:
        """A method of the rank's `NodeDisk`, by its name."""
        with self._activity.during(f"disk {method}"):
            return getattr(self._disk, method)(*args)


class HaveDisks(abc.ABC):
    """Base of the driver's handle on all ranks; does for all what `NodeDisk` does for each."""

    _crew: runtime.Crew

    @abc.abstractmethod
    def _all(self, method: str, *args: Any, **named: Any) -> list[Any]: ...

    def room(self, home: Path) -> list[tuple[str, int]]:
        """Of each rank, its node and the free bytes on the disk there that `home` is on."""
        return list(zip(self._crew.nodes, self._all("disk", "room", home), strict=True))

    def tidy(self, home: Path, keep: Collection[str]) -> None:
        self._all("disk", "tidy", home, list(keep))

    def fault(self, folder: Path, *, contents: bool) -> str:
        """Of the first rank that has one; names it."""
        found = self._all("disk", "fault", folder, contents)
        return next((f"{name}: {why}" for name, why in zip(self._crew.names, found, strict=True) if why), "")

    def begin_copy(self, folder: Path, target: Path) -> None:
        self._all("disk", "begin_copy", folder, target)

    def copied(self) -> bool:
        return all(self._all("disk", "copied"))

    def finish_copy(self) -> None:
        self._all("disk", "finish_copy")
