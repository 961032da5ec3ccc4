"""What an actor is at: answered by a thread of its own while all others hang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from stare_megatron.cluster.activity import ActivityLog, Open
from stare_megatron.host import stacks
from stare_megatron.host.evidence import Flight, Frame, ThreadStack

_GROUP = "doing"


@dataclass(frozen=True)
class Doing:
    """`activities`: not ended yet, in the order of their beginnings; `flight`: of a process that has joined
    torch.distributed."""

    activities: tuple[Open, ...]
    threads: tuple[ThreadStack, ...]
    flight: Flight | None

    def working(self) -> tuple[Frame, ...]:
        """The stack of the thread of the newest activity, innermost first; () where none goes on."""
        if not self.activities:
            return ()
        return next((t.frames for t in self.threads if t.key == self.activities[-1].thread), ())


class Answers:
    """Base of a class that `ray_actor` decorates."""

    _activity: ActivityLog

    @ray.method(concurrency_group=_GROUP)
    def doing(self) -> Doing:
        """Answered within a fraction of a second whatever the actor's calls wait for, unless the process is stopped or
        C code keeps Python's lock; `host.processes` sees it from outside then."""
        return Doing(self._activity.open(), stacks.thread_stacks(), stacks.flight())


def ray_actor(kind: type[Answers]) -> Any:
    """`ray.remote` for a class that answers beside its other calls, by a thread of its own."""
    made: Callable[[type[Answers]], Any] = ray.remote(concurrency_groups={_GROUP: 1})  # pyright: ignore[reportCallIssue]
    return made(kind)
