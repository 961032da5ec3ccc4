"""What a process and its children write, read back for the exception that ended one of them.

vLLM's core and workers, where they are processes of their own, log their exceptions and tell their parent only that
there was one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable

_MOST_BYTES = 4 << 20
# "(Worker pid=73) ERROR 11-28 15:04:18 [multiproc_executor.py:953] ": who writes, and where from.
_PREFIX = re.compile(r"(?P<who>\([^()]* pid=\d+\) )?(?:[A-Z]+ [\d-]+ [\d:.]+ \[[^\]]*\] ?)?")
_TRACEBACK = "Traceback (most recent call last):"
# Of messages that say that another process has the cause.
_ELSEWHERE = ("root cause", "EngineDeadError", "EngineCore encountered an issue")


class Output:
    """What this process and its children write from now on, where that goes to a file (Linux)."""

    def __init__(self) -> None:
        # vLLM logs to stdout, Python reports to stderr; in an engine's actor both are one file.
        opened = {
            (s.st_dev, s.st_ino): (stream, s.st_size)
            for stream in (2, 1)
            if stat.S_ISREG((s := os.fstat(stream)).st_mode)
        }
        self._from = dict(opened.values())

    @property
    def files(self) -> str:
        """Their paths, "" where there is none."""
        return " and ".join(os.readlink(_path(stream)) for stream in self._from)

    def error(self) -> str:
        """Type and message of the last exception in it that does not lead to another, "" where there is none."""
        errors = (last_error(_read(_path(stream), start)) for stream, start in self._from.items())
        return next(filter(None, errors), "")

    def explained(self, message: str) -> str:
        """`message`, or the cause where that says only that there is one; with the file that has more."""
        cause = (self.error() if points_elsewhere(message) else "") or message
        return cause.rstrip(".") + self._pointer()

    def died(self) -> str:
        """That a process is gone, with the last error, if there was one, and the file that has more."""
        error = self.error()
        return "died" + (f", after {error.rstrip('.')}" if error else "") + self._pointer()

    def _pointer(self) -> str:
        return f"; its output is in {self.files}" if self._from else ""


def _path(stream: int) -> str:
    return f"/proc/self/fd/{stream}"


def _read(path: str, start: int) -> list[str]:
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start, end - _MOST_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:  # a file system that is gone
        return []


def points_elsewhere(message: str) -> bool:
    """Whether an exception says that another process has the cause."""
    return any(words in message for words in _ELSEWHERE)


def last_error(lines: Iterable[str]) -> str:
    """Type and message of the last exception among the lines of some processes, whose tracebacks may be interleaved,
    but of those that lead to another; "" where there is none."""
    found, inside = "", set[str]()
    for line in lines:
        match = _PREFIX.match(line)
        who, text = (match["who"] or "", line[match.end() :]) if match else ("", line)
        if text == _TRACEBACK:
            inside.add(who)
        elif who in inside and text and not text[0].isspace():
            inside.remove(who)
            if not points_elsewhere(text):
                found = text.strip()
    return found
