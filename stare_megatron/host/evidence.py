"""What processes say of themselves when a run hangs, and what is seen of them from outside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """A call on a stack: the function, its file and the line it is at."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


@dataclass(frozen=True)
class ThreadStack:
    """`frames`: innermost first; `key`: Python's identifier of the thread."""

    key: int
    name: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class GroupMembers:
    """A process group of torch.distributed: its name, equal on all of its ranks, what its maker calls it, and the
    global ranks in it."""

    name: str
    description: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """A collective that a rank has entered, or a message. `number`: of the collectives of its group, from 1; `kind`: as
    torch calls it; `peer`: the global rank a message goes to or comes from, None for a collective."""

    group: str
    number: int
    kind: str
    sizes: tuple[tuple[int, ...], ...]
    finished: bool
    peer: int | None = None
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Flight:
    """What torch's flight recorder knows of a rank: its groups, and its newest operations, oldest first."""

    rank: int
    groups: tuple[GroupMembers, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class ProcessState:
    """A process from outside.

    status: psutil's word, "stopped", "disk-sleep", ...; "gone" if there is no such process.
    waits_in: the kernel function its main thread sleeps in, "" where it does not.
    kernel: that thread's stack in the kernel, where we may read it.
    bytes: resident.
    stacks: Python's, of every thread; "" where it did not write them.
    """

    pid: int
    parent: int
    name: str
    status: str
    waits_in: str
    kernel: str
    threads: int
    bytes: int
    stacks: str


@dataclass(frozen=True)
class ProcessTree:
    """A process and those under it, parents first, and the end of its log."""

    processes: tuple[ProcessState, ...]
    log: str


@dataclass(frozen=True)
class MachineState:
    """What was seen on one machine: trees by the process id that was asked for, and memory, load and GPUs, as text."""

    host: str
    trees: dict[int, ProcessTree]
    text: str
