"""Programs that tests run to their end, and what is shown of one that does not come to it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stare_megatron.host import processes

LONG_S = 1500.0  # many times what any of them takes: what does not end by then hangs, however slow the machine is


def run(command: Sequence[Any], timeout: float = LONG_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run`, with the output as text.

    Raises:
        AssertionError: it took longer than `timeout` seconds; with the stacks of it and those under it, and the end
            of what it said. They are killed.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as e:
            why = f"{' '.join(map(str, command))[:500]}\ntook more than {timeout:g} s\n{stacks(process.pid)}"
            processes.end(processes.under([process.pid]), grace=0)
            ends = [(part or b"").decode(errors="replace")[-3000:] for part in (e.stdout, e.stderr)]
            raise AssertionError("\n".join([why, *ends])) from None
        except BaseException:  # the test's own time is up
            processes.end(processes.under([process.pid]), grace=0)
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def stacks(pid: int) -> str:
    """What a process and those under it are at, as py-spy sees them; "" where it may not look."""
    found, (tree,) = [], processes.under([pid])
    for process in tree:
        dump = [Path(sys.executable).with_name("py-spy"), "dump", "--nonblocking", "--pid", str(process.pid)]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found.append(subprocess.run(dump, capture_output=True, text=True, timeout=30, check=False).stdout[:3000])
    return "\n".join(filter(None, found))
