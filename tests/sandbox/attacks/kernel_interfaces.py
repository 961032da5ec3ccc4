# Calls with a history: io_uring, bpf, userfaultfd, perf, keys, modules, kexec and their like, by number.
# Expect: ok
# From: filter
import ctypes
import errno
import platform

libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(4096)
x86 = {
    "io_setup": 206, "io_uring_setup": 425, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "keyctl": 250,
    "add_key": 248, "request_key": 249, "init_module": 175, "finit_module": 313, "kexec_load": 246, "personality": 135,
    "ptrace": 101, "seccomp": 317, "memfd_secret": 447, "fanotify_init": 300, "inotify_init1": 294, "signalfd4": 289,
    "timerfd_create": 283, "timer_create": 222, "mlockall": 151, "process_madvise": 440, "move_pages": 279,
    "kcmp": 312, "quotactl": 179, "acct": 163, "reboot": 169, "swapon": 167, "sethostname": 170, "iopl": 172,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "open_tree": 428, "fsopen": 430, "vmsplice": 278,
    "landlock_create_ruleset": 444, "modify_ldt": 154, "syslog": 103, "clock_settime": 227, "lookup_dcookie": 212,
}
arm = {"io_uring_setup": 425, "bpf": 280, "userfaultfd": 282, "perf_event_open": 241, "keyctl": 219, "add_key": 217}
refused = (errno.EPERM, errno.ENOSYS)
for name, number in {"x86_64": x86, "aarch64": arm}[platform.machine()].items():
    result = libc.syscall(ctypes.c_long(number), buffer, buffer, buffer, buffer, buffer)
    if result >= 0 or ctypes.get_errno() not in refused:
        print("ESCAPED reached", name, result, ctypes.get_errno())
