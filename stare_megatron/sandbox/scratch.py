"""Scratch directories on the machine's own file system: how full they are, and their removal.

What is in them was made by hostile code: nothing is followed, and depth costs no stack.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator

_BLOCK = 512  # bytes in a unit of st_blocks


def over(path: str, megabytes: int, files: int) -> bool:
    """Whether the tree holds more bytes or entries than allowed. Stops counting once it does.

    A directory that cannot be looked into counts as over: it may hide anything.
    """
    bytes_left, entries_left = megabytes << 20, files
    try:
        for information in _entries(path):
            bytes_left -= information.st_blocks * _BLOCK
            entries_left -= 1
            if bytes_left < 0 or entries_left < 0:
                return True
    except OSError:
        return True
    return False


def _entries(top: str) -> Iterator[os.stat_result]:
    """All entries of a tree; directories are opened relative to their parent, so that long paths work too."""
    waiting = [os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)]
    try:
        while waiting:
            parent = waiting.pop()
            try:
                for name in os.listdir(parent):
                    with contextlib.suppress(FileNotFoundError):  # removed since
                        information = os.stat(name, dir_fd=parent, follow_symlinks=False)
                        yield information
                        if stat.S_ISDIR(information.st_mode):
                            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                            waiting.append(os.open(name, flags, dir_fd=parent))
            finally:
                os.close(parent)
    finally:
        for fd in waiting:
            os.close(fd)


def remove(path: str) -> None:
    """Remove a tree, however deep, whose owner may have taken permissions away. An absent one is fine.

    Directories are moved up to the top before they are emptied, so no path is long and nothing recurses.

    Raises:
        OSError: something in it cannot be removed.
    """
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        while names := os.listdir(top):
            for name in names:
                _remove_entry(name, top)
    finally:
        os.close(top)
    os.rmdir(path)


def _remove_entry(name: str, top: int) -> None:
    if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=top)
        return
    os.chmod(name, 0o700, dir_fd=top)
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for child in os.listdir(inner):
            if stat.S_ISDIR(os.stat(child, dir_fd=inner, follow_symlinks=False).st_mode):
                os.chmod(child, 0o700, dir_fd=inner)
                os.rename(child, secrets.token_hex(16), src_dir_fd=inner, dst_dir_fd=top)
            else:
                os.unlink(child, dir_fd=inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=top)
