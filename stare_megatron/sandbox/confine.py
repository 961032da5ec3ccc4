"""What a freshly forked child gives up before it sees any code. Order matters: each step needs what later ones take."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from dataclasses import dataclass

from stare_megatron.sandbox import anchors, landlock, namespaces, seccomp
from stare_megatron.sandbox.plan import REPORT, Limits, Plan
from stare_megatron.sandbox.syscalls import call

OPEN_FILES = 64

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _CLEAR_ALL = 24, 47, 4
_CAPABILITY_VERSION = 0x20080522


@dataclass(frozen=True)
class Inherited:
    """What a child has from the worker: bytes of address space already mapped, and directories it imports through."""

    mapped: int
    anchors: int


def hide() -> None:
    """Make this process's memory and descriptors unreadable to others of the same user."""
    call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def confine(plan: Plan, limits: Limits, inherited: Inherited) -> None:
    """Give up everything but descriptors 0 to REPORT, the interpreter's files and a scratch directory, the new cwd.

    Raises:
        OSError: a step is refused; nothing may run then.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        uid = gid = plan.uid
    if plan.namespaces:
        scratch = namespaces.SCRATCH
        namespaces.private_scratch(limits.scratch_mb, limits.scratch_files, uid, gid)
    else:
        scratch = os.path.join(plan.base, limits.name)
        os.mkdir(scratch, 0o700)
        os.chown(scratch, uid, gid)
    os.chdir(scratch)
    os.environ.update(HOME=scratch, TMPDIR=scratch)
    anchors.close_others(REPORT + 1, _open_limit(), inherited.anchors)
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if plan.landlock:
        files = [(path, landlock.READ) for path in plan.readable]
        devices = [(path, landlock.READ) for path in ("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")]
        landlock.restrict([*files, *devices, ("/dev/null", landlock.WRITE), (scratch, landlock.WRITE)])
    _become(uid, gid)
    die_with_parent()  # after the change of user, which clears it
    _limit(limits, inherited.mapped)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if plan.seccomp:
        seccomp.install(os.getpid())


def _open_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _become(uid: int, gid: int) -> None:
    """Another user if root, and no capability either way."""
    call("prctl", _PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    if os.geteuid() == 0:
        for capability in range(64):
            try:
                call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
            except OSError:  # past the last one this kernel has
                break
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    call("capset", ctypes.create_string_buffer(header, 8), ctypes.create_string_buffer(24))
    if 0 in os.getresuid():
        raise OSError(0, "still root")


def _limit(limits: Limits, mapped: int) -> None:
    """Kernel limits. Memory is counted from what the warm interpreter has already mapped."""
    scratch = limits.scratch_mb << 20
    values = {
        resource.RLIMIT_AS: mapped + (limits.memory_mb << 20),
        resource.RLIMIT_FSIZE: scratch,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if limits.cpu_seconds:
        values[resource.RLIMIT_CPU] = limits.cpu_seconds
    for kind, value in values.items():
        resource.setrlimit(kind, (value, value))
