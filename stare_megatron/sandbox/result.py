"""What one call came to. One type for the local pool and the remote server."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Status(enum.Enum):
    """How a call ended. All but `OK`, `ERROR` and `EXITED` are seen from outside the process that ran the code."""

    OK = "ok"  # the last statement was reached
    ERROR = "error"  # an exception nobody caught; the traceback is the end of stderr
    EXITED = "exited"  # the code ended its process before its end: sys.exit, os._exit
    TIMEOUT = "timeout"  # past the wall-clock or the CPU limit
    MEMORY = "memory"  # MemoryError that nobody caught
    OUTPUT = "output"  # more output than allowed; what fits is kept
    DISK = "disk"  # more scratch files or bytes than allowed (where a quota does not refuse them in the first place)
    KILLED = "killed"  # a signal ended the process: a crash in native code, a kill
    TAMPERED = "tampered"  # something else than the runner wrote on the runner's channel
    LOST = "lost"  # the tool failed, not the code: a worker died, a server did not answer


@dataclass(frozen=True)
class Result:
    """One call: `Result(Status.OK, stdout="4\\n", stderr="", value="4", exit_code=0, cpu_ms=1.2, wall_ms=3.4)`.

    `value` is the `repr` of a trailing expression if the caller asked for it, else "". `exit_code` is what the process
    or `sys.exit` gave, minus the signal's number if a signal ended it. stdout, stderr and value are what the code says
    and no more trustworthy than the code.
    """

    status: Status
    stdout: str
    stderr: str
    value: str
    exit_code: int
    cpu_ms: float
    wall_ms: float


def lost(why: str, wall_ms: float = 0.0) -> Result:
    """A call that the tool itself failed; `why` goes where the model or a log would look."""
    return Result(Status.LOST, "", why, "", -1, 0.0, wall_ms)
