"""The one handle through which the algorithm talks to other ranks.

Tokens of an update batch are spread over the data-parallel x context-parallel ranks of the last pipeline stage. Every
token lives on exactly one of them; tensor-parallel ranks hold the same tokens and each reduces over its own group.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist


class Comm(Protocol):
    """Collectives over the ranks that share an update batch. All ranks call them in the same order."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, elementwise, in place; returns `x`. Exact, hence independent of the layout, for int64."""
        ...

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """Maximum over ranks, elementwise, in place; returns `x`."""
        ...

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """`x` of every rank, in rank order; the shapes must be equal."""
        ...


class OneRank:
    """All tokens are here."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


class GroupComm:
    """Shards over a torch.distributed process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = dist.get_world_size(group)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=self._group)
        return x

    def max(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self._group)
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(self._size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return parts


def comm(group: dist.ProcessGroup) -> Comm:
    """`OneRank` for a group of one, else `GroupComm`."""
    return OneRank() if dist.get_world_size(group) == 1 else GroupComm(group)
