"""How this program is called from where the user is, for the commands that it prints, and how it ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

NAME = "stare-megatron"


def called() -> str:
    """`stare-megatron` where a shell finds this environment's; else its path, from the current directory if it lies
    below that; else by the interpreter. Quoted for a shell."""
    beside = Path(sys.executable).parent / NAME  # in an environment, not where its interpreter's link leads
    found = shutil.which(NAME)
    if found is not None and (not beside.exists() or os.path.samefile(found, beside)):
        return NAME
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m stare_megatron"
    below = beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
    return shlex.quote(str(below) if len(below.parts) > 1 else f"./{below}")


@contextlib.contextmanager
def taking_long() -> Iterator[None]:
    """For a command that takes long: SIGTERM, and SIGHUP of a terminal that is closed, end it as Ctrl-C does, and what
    it prints need not be read any more."""
    from stare_megatron.host.signals import interruptible
    from stare_megatron.host.streams import outlive_readers

    outlive_readers()
    with interruptible():
        yield


def leave() -> None:
    """The command is over. Python's own end takes a moment, and would answer a Ctrl-C with a traceback: it ends at once
    from here on, without a word."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
