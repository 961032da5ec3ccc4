"""What is known of a process of a run that hangs."""

from __future__ import annotations

from dataclasses import dataclass

from stare_megatron.host.evidence import Flight, Frame, ProcessState, ProcessTree, ThreadStack


@dataclass(frozen=True)
class Witness:
    """A process of the run: what it said, and what was seen of it.

    name: as the user knows it.
    rank: of a trainer rank; -1: of another kind.
    answers: whether it said what it is at.
    trouble: why it could not, if it answered so far.
    activity: what it is at, and for how long; "" if nothing.
    frames: of the thread that works, innermost first.
    threads: the stacks of all.
    flight: of a rank.
    tree: it and those under it, as seen from outside; None if nobody could look.
    """

    name: str
    rank: int
    answers: bool
    trouble: str = ""
    activity: str = ""
    frames: tuple[Frame, ...] = ()
    threads: tuple[ThreadStack, ...] = ()
    flight: Flight | None = None
    tree: ProcessTree | None = None

    @property
    def processes(self) -> tuple[ProcessState, ...]:
        """Parents first."""
        return self.tree.processes if self.tree else ()

    @property
    def outside(self) -> str:
        """What is seen to keep it from working, if anything."""
        for process in self.processes:
            own = process is self.processes[0]
            which = f"process {process.pid}" if own else f"its process {process.pid}, {process.name},"
            if process.status in _STOPPED:
                return f"is stopped ({which})" if own else f"waits: {which} is stopped"
            if own and process.status in _ENDED:  # children that ended and were not asked about are of no account
                return f"has ended ({which})"
        return "" if self.processes or self.answers else "does not answer, nor does its machine"


_STOPPED = ("stopped", "tracing-stop")
_ENDED = ("zombie", "gone")
