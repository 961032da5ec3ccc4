"""System calls by number and by hand: what Python has no function for, and the numbers the filter compares.

Numbers are those of the kernel's `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass

# name:x86-64:aarch64, `-` where the architecture has none.
_TABLE = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
    close:3:57 close_range:436:436 lseek:8:62 fstat:5:80 stat:4:- lstat:6:- newfstatat:262:79 statx:332:291
    access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:- readlinkat:267:78 getdents64:217:61 getcwd:79:17
    chdir:80:49 fchdir:81:50 statfs:137:43 fstatfs:138:44 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:-
    unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276 symlink:88:- symlinkat:266:36 link:86:-
    linkat:265:37 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83 flock:73:32 fadvise64:221:223
    sendfile:40:71 copy_file_range:326:285 umask:95:166 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59
    eventfd2:290:19 poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232:- epoll_pwait:281:22 recvfrom:45:207 getsockname:51:204 mmap:9:222 mprotect:10:226
    munmap:11:215 mremap:25:216 madvise:28:233 msync:26:227 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135
    rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132
    pause:34:- restart_syscall:219:128 alarm:37:- setitimer:38:103 getitimer:36:102 nanosleep:35:101
    clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:-
    times:100:153 getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176
    getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150 getpgrp:111:- getpgid:121:155
    getsid:124:156 getrlimit:97:163 getrusage:98:165 sysinfo:99:179 uname:63:160 sched_yield:24:124
    sched_getaffinity:204:123 getcpu:309:168 futex:202:98 membarrier:324:283 getrandom:318:278 exit:60:93
    exit_group:231:94
    listxattr:194:11 llistxattr:195:12 flistxattr:196:13
    openat:257:56 fcntl:72:25 ioctl:16:29 kill:62:129 tgkill:234:131 prlimit64:302:261 socketpair:53:199
    sendto:44:206
    chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 utime:132:- utimes:235:- utimensat:280:88
    futimesat:261:- clone3:435:435 openat2:437:437
    capset:126:91 landlock_create_ruleset:444:444 landlock_add_rule:445:445 landlock_restrict_self:446:446
    unshare:272:97 mount:165:40 umount2:166:39 pivot_root:155:41 mount_setattr:442:442 seccomp:317:277
    prctl:157:167 pidfd_open:434:434 pidfd_send_signal:424:424
"""


@dataclass(frozen=True)
class Architecture:
    """A machine type: its AUDIT_ARCH constant and its numbers by name."""

    audit: int
    numbers: dict[str, int]


def _numbers(column: int) -> dict[str, int]:
    rows = [item.split(":") for item in _TABLE.split()]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


ARCHITECTURES = {
    "x86_64": Architecture(0xC000003E, _numbers(1)),
    "aarch64": Architecture(0xC00000B7, _numbers(2)),
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def here() -> Architecture:
    """This machine's.

    Raises:
        OSError: neither x86-64 nor aarch64.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(0, f"no table of system calls for {machine}")
    return ARCHITECTURES[machine]


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Make a system call; integers are passed as C longs, bytes and buffers as pointers.

    Raises:
        OSError: it failed; names the call.
    """
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = _libc.syscall(ctypes.c_long(here().numbers[name]), *values)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result
