"""A worker's own view of the machine: namespaces and a root that holds only what Python needs. namespaces(7)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

from stare_megatron.sandbox.syscalls import call

SCRATCH = "/scratch"

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def unshare() -> None:
    """Leave the machine's namespaces; the next child is the first process of a new one. Without root, a user namespace.

    Raises:
        OSError: not allowed here.
    """
    others = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        call("unshare", others)
        return
    call("unshare", others | _NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def private_root(base: str, readable: Iterable[str]) -> None:
    """Make a new root on the directory `base` with the `readable` paths (read-only), a few devices and an empty
    directory for scratch, and leave the old one.

    Raises:
        OSError: a mount is refused.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for path in readable:
        _bind(path, base, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for path in _DEVICES:
        _bind(path, base, _ATTR_RDONLY | _ATTR_NOSUID)
    os.mkdir(base + SCRATCH)
    for name in ("/tmp", "/dev/shm"):
        if not os.path.lexists(base + name):
            os.symlink(SCRATCH, base + name)
    os.chdir(base)
    call("pivot_root", b".", b".")
    call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    _attributes("/", _ATTR_RDONLY, 0)


def private_scratch(megabytes: int, files: int, uid: int, gid: int) -> None:
    """Give the calling process a scratch directory of its own, of limited size, which ends with it.

    Raises:
        OSError: a mount is refused.
    """
    call("unshare", _NEWNS)
    # The directory itself takes an inode.
    options = f"size={megabytes}m,nr_inodes={files + 1},mode=700,uid={uid},gid={gid}"
    _mount("tmpfs", SCRATCH, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)


def _bind(path: str, base: str, attributes: int) -> None:
    if not os.path.exists(path):
        return
    target = base + path
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    _mount(path, target, None, _MS_BIND | _MS_REC)
    _attributes(target, attributes, _AT_RECURSIVE)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    try:
        call(
            "mount", source.encode(), target.encode(), None if kind is None else kind.encode(), flags, options.encode()
        )
    except OSError as e:
        raise OSError(e.errno, f"mount of {source} at {target}: {os.strerror(e.errno or 0)}") from e


def _attributes(path: str, attributes: int, flags: int) -> None:
    structure = struct.pack("=QQQQ", attributes, 0, 0, 0)
    call("mount_setattr", _AT_FDCWD, path.encode(), flags, structure, len(structure))
