"""Imports from directories whose path an unprivileged user may not walk, such as an interpreter in root's home.

Root opens those directories, and the import path names them as `/proc/self/fd/N`, which leads to the directory itself.
Children keep these descriptors. Landlock still judges the files by where they really are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

FIRST = 300  # descriptor of the first anchor
MOST = 64


def _closed(path: str) -> bool:
    """Whether a directory above, or this one, is closed to others. Access lists are not consulted."""
    path = os.path.realpath(path)
    while path != "/":
        if not os.stat(path).st_mode & 0o001:
            return True
        path = os.path.dirname(path)
    return False


def _open(paths: Iterable[str]) -> dict[str, str]:
    """Open each closed directory of `paths`; path -> name through its descriptor.

    Raises:
        OSError: more of them than descriptors set aside.
    """
    names: dict[str, str] = {}
    for path in paths:
        if os.path.isdir(path) and _closed(path):
            if len(names) == MOST:
                raise OSError(0, f"more than {MOST} directories on sys.path")
            number = FIRST + len(names)
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
            os.dup2(fd, number)
            os.close(fd)
            names[path] = f"/proc/self/fd/{number}"
    return names


def reroute() -> int:
    """Have imports go through anchors where they must; the number of anchors."""
    names = _open(dict.fromkeys(sys.path))

    def through(entry: str) -> str:
        for path, name in names.items():
            if entry == path or entry.startswith(path + "/"):
                return name + entry[len(path) :]
        return entry

    sys.path[:] = [through(entry) for entry in sys.path]
    for module in list(sys.modules.values()):
        if "__path__" in vars(module):
            module.__path__ = [through(entry) for entry in module.__path__]
    sys.path_importer_cache.clear()
    return len(names)


def close_others(first: int, limit: int, kept: int) -> None:
    """Close all descriptors from `first` on but the anchors."""
    os.closerange(first, FIRST)
    os.closerange(FIRST + kept, max(limit, FIRST + MOST))
