"""Landlock: a process gives up, for good, every file it does not name. landlock(7), linux/landlock.h."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from stare_megatron.sandbox.syscalls import call

_VERSION_FLAG = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE = 1 << 13, 1 << 14

READ = _READ_FILE | _READ_DIR
WRITE = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE  # rights that a rule on something not a directory may give

# Version -> number of file rights it knows (bits from 0).
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK_FROM, _SCOPED_FROM = 4, 6
_TCP, _SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals


def version() -> int:
    """The kernel's Landlock ABI.

    Raises:
        OSError: it has none, or it is switched off.
    """
    return call("landlock_create_ruleset", None, 0, _VERSION_FLAG)


def restrict(rules: Iterable[tuple[str, int]]) -> None:
    """Allow only `(path, READ or WRITE)` and what is beneath; no_new_privs must be set. Absent paths are left out.

    Raises:
        OSError: the kernel refuses.
    """
    abi = version()
    handled = (1 << _FILE_RIGHTS.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", handled, _TCP * (abi >= _NETWORK_FROM), _SCOPES * (abi >= _SCOPED_FROM))
    size = 8 + 8 * (abi >= _NETWORK_FROM) + 8 * (abi >= _SCOPED_FROM)
    ruleset = call("landlock_create_ruleset", ctypes.create_string_buffer(attributes, 24), size, 0)
    for path, access in rules:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = access & handled
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            allowed &= _ON_FILES
        rule = struct.pack("=Qi", allowed, fd)
        call("landlock_add_rule", ruleset, _PATH_BENEATH, ctypes.create_string_buffer(rule, len(rule)), 0)
        os.close(fd)
    call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)
