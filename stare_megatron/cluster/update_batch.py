"""What an update trains on, and each rank's share of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import ray

from stare_megatron.types import GroupSummary, UpdateShare


class UpdateBatch(Protocol):
    """The groups to train on: references, and what the driver knows of each."""

    @property
    def groups(self) -> Sequence[tuple[Any, GroupSummary]]: ...


def with_groups(
    groups: Sequence[tuple[ray.ObjectRef, GroupSummary]], share: UpdateShare
) -> tuple[list[ray.ObjectRef], UpdateShare]:
    """References of the groups a share names, and the share renumbered to that list."""
    needed = sorted({a.group for a in share.assignments})
    index = {group: i for i, group in enumerate(needed)}
    renumbered = tuple(dataclasses.replace(a, group=index[a.group]) for a in share.assignments)
    return [groups[g][0] for g in needed], dataclasses.replace(share, assignments=renumbered)
