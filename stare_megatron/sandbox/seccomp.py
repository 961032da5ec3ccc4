"""The system-call filter: a classic BPF program, default deny, assembled here.

By hand rather than through libseccomp: the program is installed again in each call (it holds the process's own id),
which costs microseconds this way, and needs nothing that a plain machine may lack. seccomp(2), linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from dataclasses import dataclass

from stare_megatron.sandbox import syscalls
from stare_megatron.sandbox.syscalls import Architecture

KILL_PROCESS = 0x80000000
ERRNO = 0x00050000
ALLOW = 0x7FFF0000

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000
_SECCOMP_SET_MODE_FILTER = 1

# Allowed whatever the arguments. What is not here or below fails with EPERM.
_PLAIN = """
    read write readv writev pread64 pwrite64 preadv pwritev close close_range lseek fstat stat lstat newfstatat
    statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd chdir fchdir statfs fstatfs mkdir
    mkdirat rmdir unlink unlinkat rename renameat renameat2 symlink symlinkat link linkat ftruncate fallocate
    fsync fdatasync flock fadvise64 sendfile copy_file_range umask dup dup2 dup3 pipe pipe2 eventfd2 poll ppoll
    select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait recvfrom getsockname mmap mprotect munmap
    mremap madvise msync brk rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait
    rt_sigsuspend sigaltstack pause restart_syscall alarm setitimer getitimer nanosleep clock_nanosleep
    clock_gettime clock_getres gettimeofday time times getpid getppid gettid getuid geteuid getgid getegid
    getgroups getresuid getresgid getpgrp getpgid getsid getrlimit getrusage sysinfo uname sched_yield
    sched_getaffinity getcpu futex membarrier getrandom exit exit_group
"""
PLAIN = _PLAIN.split()

# "Not implemented", so that libc falls back to the form whose arguments a filter can see.
_MISSING = ("clone3", "openat2")
# "Not on this file system": `shutil.copytree` goes on without extended attributes.
_UNSUPPORTED = ("listxattr", "llistxattr", "flistxattr")
# Say they worked and do nothing: `shutil.copy` sets modes and times of the files it writes. Landlock does not cover
# these calls, so that for a user's own files outside the scratch directory they must not happen.
_IGNORED = ("chmod", "fchmod", "fchmodat", "fchmodat2", "utime", "utimes", "utimensat", "futimesat")


@dataclass(frozen=True)
class Test:
    """(argument & mask) == value, over 64 bits. A mask of 32 bits for an `int`: the kernel ignores the rest too."""

    argument: int
    mask: int
    value: int


_INT = 0xFFFFFFFF
_ACCESS_MODE, _WRITE_ONLY, _READ_WRITE, _TRUNCATE = 0o3, 0o1, 0o2, 0o1000
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)  # duplicate, flags, locks; not owners, leases, pipe sizes, seals
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # terminal?, window size, bytes to read, blocking, cloexec

_Alternatives = tuple[tuple[Test, ...], ...]


def _conditions(pid: int) -> dict[str, _Alternatives]:
    """Calls allowed if all tests of one alternative hold. `pid`: the only process that may be signalled."""
    return {
        # Truncating through a read-only descriptor escapes Landlock before its third version.
        "openat": (
            (Test(2, _TRUNCATE, 0),),
            (Test(2, _ACCESS_MODE, _WRITE_ONLY),),
            (Test(2, _ACCESS_MODE, _READ_WRITE),),
        ),
        "fcntl": tuple((Test(1, _INT, command),) for command in _FCNTL),
        "ioctl": tuple((Test(1, _INT, request),) for request in _IOCTL),
        "kill": ((Test(0, _INT, pid),),),
        "tgkill": ((Test(0, _INT, pid),),),
        # Reading its own limits.
        "prlimit64": ((Test(0, _INT, 0), Test(2, 2**64 - 1, 0)), (Test(0, _INT, pid), Test(2, 2**64 - 1, 0))),
        # A connected pair, which event loops wake themselves with: AF_UNIX and SOCK_STREAM, no address ever.
        "socketpair": ((Test(0, _INT, 1), Test(1, 0xF, 1)),),
        "sendto": ((Test(4, 2**64 - 1, 0),),),
    }


def program(architecture: Architecture, pid: int) -> bytes:
    """The filter for one process, as an array of struct sock_filter."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, architecture.audit),
        (_RETURN, 0, 0, KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, KILL_PROCESS),
    ]
    numbers = architecture.numbers
    refused = [(_RETURN, 0, 0, ERRNO | errno.EPERM)]
    for name in PLAIN:
        if name in numbers:
            code += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, ALLOW)]
    for group, value in ((_MISSING, errno.ENOSYS), (_UNSUPPORTED, errno.EOPNOTSUPP), (_IGNORED, 0)):
        for name in group:
            if name in numbers:
                code += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, ERRNO | value)]
    for name, alternatives in _conditions(pid).items():
        block = [step for tests in alternatives for step in _alternative(tests)] + refused
        code += [(_EQUAL, 0, len(block), numbers[name]), *block]
    return b"".join(struct.pack("=HBBI", *step) for step in code + refused)


def _alternative(tests: tuple[Test, ...]) -> list[tuple[int, int, int, int]]:
    """Allow if all tests hold, else fall through to what follows."""
    steps: list[tuple[int, int, int, int]] = []
    halves = [(test, shift) for test in tests for shift in (0, 32) if (test.mask >> shift) & 0xFFFFFFFF]
    for left, (test, shift) in reversed(list(enumerate(halves, 1))):
        after = 3 * (len(halves) - left) + 1  # steps from the end of this comparison to the end of the alternative
        offset = _ARGUMENTS + 8 * test.argument + shift // 8
        steps = [
            (_LOAD, 0, 0, offset),
            (_AND, 0, 0, (test.mask >> shift) & 0xFFFFFFFF),
            (_EQUAL, 0, after, (test.value >> shift) & 0xFFFFFFFF),
            *steps,
        ]
    return [*steps, (_RETURN, 0, 0, ALLOW)]


def install(pid: int) -> None:
    """Filter this thread, for good; no_new_privs must be set.

    Raises:
        OSError: the kernel refuses.
    """
    filter_ = ctypes.create_string_buffer(code := program(syscalls.here(), pid), len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(filter_)), 16)
    syscalls.call("seccomp", _SECCOMP_SET_MODE_FILTER, 0, header)
